#include "protocol.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace protocol {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.fd_;
    other.fd_ = -1;
  }
  return *this;
}

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

void throw_errno(const std::string& what) { throw IoError(what + ": " + std::strerror(errno)); }

sockaddr_un make_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    throw IoError("socket path: expected 1.." + std::to_string(sizeof address.sun_path - 1) + " bytes, got " +
                  std::to_string(path.size()));
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

UniqueFd connect_to(const std::string& path) {
  const sockaddr_un address = make_address(path);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) throw_errno("socket");
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    throw_errno("connect to " + path);
  }
  return fd;
}

bool receive(int fd, void* data, size_t bytes) {
  auto* at = static_cast<char*>(data);
  for (size_t left = bytes; left > 0;) {
    const ssize_t got = ::recv(fd, at, left, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) throw IoError("recv: the peer was silent for too long");
    if (got < 0) throw_errno("recv");
    if (got == 0) {
      if (left == bytes) return false;
      throw IoError("recv: expected " + std::to_string(left) + " more bytes, got the end of the connection");
    }
    at += got;
    left -= static_cast<size_t>(got);
  }
  return true;
}

void receive_rest(int fd, void* data, size_t bytes) {
  if (!receive(fd, data, bytes)) {
    throw IoError("recv: expected " + std::to_string(bytes) + " more bytes, got the end of the connection");
  }
}

void send_all(int fd, const void* data, size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = ::send(fd, at, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno == EAGAIN) throw IoError("send: the peer did not read for too long");
    if (sent < 0) throw_errno("send");
    at += sent;
    bytes -= static_cast<size_t>(sent);
  }
}

}  // namespace protocol
