#include "server.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <iterator>
#include <thread>
#include <utility>

using protocol::IoError;
using protocol::UniqueFd;

namespace {

constexpr int kMaxConnections = 256;  // more wait in the listener's backlog
constexpr int kBacklog = 64;
constexpr timeval kPeerTimeout = {5, 0};  // for a peer that stops in the middle of a message

// Whether the path is a socket that nobody listens on: what a server leaves that was killed.
bool is_stale_socket(const std::string& path) {
  struct stat status;
  if (::lstat(path.c_str(), &status) != 0 || !S_ISSOCK(status.st_mode)) return false;
  try {
    protocol::connect_to(path);
    return false;
  } catch (const IoError&) {
    return true;
  }
}

UniqueFd listen_on(const std::string& path) {
  const sockaddr_un address = protocol::make_address(path);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) protocol::throw_errno("socket");
  if (is_stale_socket(path)) ::unlink(path.c_str());
  const mode_t old_mask = ::umask(0177);  // only the owner may connect
  const int bound = ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int bind_errno = errno;
  ::umask(old_mask);
  errno = bind_errno;
  if (bound != 0) protocol::throw_errno("bind to " + path);
  if (::listen(fd.get(), kBacklog) != 0) protocol::throw_errno("listen on " + path);
  return fd;
}

// Bytes of an fp32 matrix, or the largest number if they do not fit.
uint64_t matrix_bytes(uint32_t rows, uint64_t cols) {
  uint64_t bytes;
  return __builtin_mul_overflow(sizeof(float) * rows, cols, &bytes) ? UINT64_MAX : bytes;
}

}  // namespace

Server::Server(const Model& model, const ServerOptions& options)
    : model_(model), options_(options), listener_(listen_on(options.socket_path)), wake_(::eventfd(0, EFD_CLOEXEC)) {
  if (wake_.get() < 0) protocol::throw_errno("eventfd");
}

Server::~Server() { ::unlink(options_.socket_path.c_str()); }

void Server::run(int stop_fd) {
  std::vector<std::thread> workers;
  std::exception_ptr failure;
  try {
    for (int i = 0; i < options_.workers; ++i) workers.emplace_back([this] { work(); });
    wait_for_requests(stop_fd);
  } catch (...) {
    failure = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    queue_.clear();
    for (const int fd : active_) ::shutdown(fd, SHUT_RD);  // nobody waits for the rest of a request
  }
  queue_changed_.notify_all();
  for (std::thread& worker : workers) worker.join();
  if (failure) std::rethrow_exception(failure);
}

void Server::wait_for_requests(int stop_fd) {
  std::vector<pollfd> events;
  while (!stopping_) {
    const bool full = connections_ >= kMaxConnections;
    events = {{stop_fd, POLLIN, 0}, {wake_.get(), POLLIN, 0}, {listener_.get(), short(full ? 0 : POLLIN), 0}};
    const size_t first = events.size();
    for (const UniqueFd& fd : idle_) events.push_back({fd.get(), POLLIN, 0});
    if (::poll(events.data(), events.size(), -1) < 0) {
      if (errno == EINTR) continue;
      protocol::throw_errno("poll");
    }
    if (events[0].revents) return;
    for (size_t i = idle_.size(); i-- > 0;) {  // backwards, since the last one takes the place of one that leaves
      if (!events[first + i].revents) continue;
      enqueue(std::exchange(idle_[i], std::move(idle_.back())));
      idle_.pop_back();
    }
    if (events[1].revents) take_returned();
    if (events[2].revents) accept_connection();
  }
}

void Server::accept_connection() {
  UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (fd.get() < 0) return;  // the client has gone, or no descriptor is left; those that wait are served later
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &kPeerTimeout, sizeof kPeerTimeout);
  ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &kPeerTimeout, sizeof kPeerTimeout);
  idle_.push_back(std::move(fd));
  ++connections_;
}

void Server::enqueue(UniqueFd connection) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(connection));
  }
  queue_changed_.notify_one();
}

void Server::take_returned() {
  uint64_t count;
  [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &count, sizeof count);
  const std::lock_guard lock(mutex_);
  std::move(returned_.begin(), returned_.end(), std::back_inserter(idle_));
  returned_.clear();
}

void Server::wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t sent = ::write(wake_.get(), &one, sizeof one);
}

void Server::work() {
  Scratch scratch;
  while (true) {
    UniqueFd connection;
    {
      std::unique_lock lock(mutex_);
      queue_changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      connection = std::move(queue_.front());
      queue_.pop_front();
      active_.insert(connection.get());
    }
    bool keep = false;
    try {
      keep = serve_one(connection.get(), scratch);
    } catch (const std::exception& error) {  // one client's trouble is not the others'
      std::fprintf(stderr, "cpp_server: connection closed: %s\n", error.what());
    }
    {
      const std::lock_guard lock(mutex_);
      active_.erase(connection.get());
      if (keep) returned_.push_back(std::move(connection));
    }
    if (!keep) --connections_;
    wake();
  }
}

// Answers one request. Returns whether the connection stays open.
bool Server::serve_one(int fd, Scratch& scratch) {
  uint32_t magic;
  if (!protocol::receive(fd, &magic, sizeof magic)) return false;
  if (magic == protocol::kGemmMagic) return serve_gemm(fd, scratch);
  if (magic == protocol::kShutdownMagic) {
    const protocol::ReplyHeader reply = {protocol::kOk, 0, 0};
    protocol::send_all(fd, &reply, sizeof reply);
    stopping_ = true;
    return false;
  }
  return reject(fd, protocol::kBadRequest, "magic: expected CXGM or CXSD, got " + std::to_string(magic), false);
}

bool Server::serve_gemm(int fd, Scratch& scratch) {
  uint32_t name_bytes;
  protocol::receive_rest(fd, &name_bytes, sizeof name_bytes);
  if (name_bytes > protocol::kMaxNameBytes) {
    return reject(fd, protocol::kBadRequest,
                  "layer name: expected at most " + std::to_string(protocol::kMaxNameBytes) + " bytes, got " +
                      std::to_string(name_bytes),
                  false);
  }
  std::string name(name_bytes, '\0');
  protocol::receive_rest(fd, name.data(), name_bytes);
  uint32_t shape[2];
  protocol::receive_rest(fd, shape, sizeof shape);
  const auto [m, k] = shape;

  const uint64_t limit = options_.max_matrix_bytes;
  const uint64_t x_bytes = matrix_bytes(m, k);
  if (x_bytes > limit) {
    return reject(fd, protocol::kTooLarge,
                  "x: expected at most " + std::to_string(limit) + " bytes, got " + std::to_string(x_bytes), false);
  }
  // From here on the whole request is read before it is judged, so that the connection can go on after an error.
  if (scratch.x.size() < x_bytes / 4) scratch.x.resize(x_bytes / 4);
  protocol::receive_rest(fd, scratch.x.data(), x_bytes);

  const auto found = model_.find(name);
  if (found == model_.end()) {
    return reject(fd, protocol::kUnknownLayer, "layer: expected a layer of the file, got '" + name + "'", true);
  }
  const ServedLayer& layer = found->second;
  const int64_t n = layer.weight.n();
  if (k != layer.weight.k()) {
    return reject(fd, protocol::kWrongShape,
                  "x: expected K=" + std::to_string(layer.weight.k()) + ", got K=" + std::to_string(k), true);
  }
  const uint64_t y_bytes = matrix_bytes(m, static_cast<uint64_t>(n));
  if (y_bytes > limit) {
    return reject(fd, protocol::kTooLarge,
                  "y: expected at most " + std::to_string(limit) + " bytes, got " + std::to_string(y_bytes), true);
  }
  if (scratch.y.size() < y_bytes / 4) scratch.y.resize(y_bytes / 4);

  cutlass_ext::Options options;
  options.threads = options_.gemm_threads;
  try {
    cutlass_ext::gemm<float>(layer.weight, {scratch.x.data(), m, k}, {scratch.y.data(), m, n},
                             layer.bias.empty() ? nullptr : layer.bias.data(), scratch.workspace, options);
  } catch (const cutlass_ext::Error& error) {
    return reject(fd, protocol::kInternal, error.what(), true);
  }
  const protocol::ReplyHeader reply = {protocol::kOk, m, static_cast<uint32_t>(n)};
  protocol::send_all(fd, &reply, sizeof reply);
  protocol::send_all(fd, scratch.y.data(), y_bytes);
  return true;
}

// Answers with an error. Returns `keep`: whether the next request's first byte is known.
bool Server::reject(int fd, protocol::Status status, const std::string& message, bool keep) {
  const protocol::ReplyHeader reply = {status, static_cast<uint32_t>(message.size()), 0};
  protocol::send_all(fd, &reply, sizeof reply);
  protocol::send_all(fd, message.data(), message.size());
  return keep;
}
