// The wire format, as the README documents it, and the socket calls under it. All numbers are little-endian, which is
// the only byte order that the program is built for.
#pragma once

#include <sys/un.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire and file formats are little-endian");

namespace protocol {

constexpr uint32_t kGemmMagic = 0x4d475843;      // "CXGM"
constexpr uint32_t kShutdownMagic = 0x44535843;  // "CXSD"
constexpr uint32_t kMaxNameBytes = 1024;

enum Status : uint32_t {
  kOk = 0,
  kBadRequest = 1,  // not this protocol; the server closes the connection
  kUnknownLayer = 2,
  kWrongShape = 3,  // K is not the layer's
  kTooLarge = 4,    // over the server's limit; it closes the connection
  kInternal = 5,
};

struct ReplyHeader {
  uint32_t status;
  uint32_t m_or_message_bytes;
  uint32_t n;  // 0 in error replies
};

// A socket error, or a peer that closed in the middle of a message.
class IoError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file descriptor that is closed with its owner.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd();

  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

// Throws IoError with the text of errno.
[[noreturn]] void throw_errno(const std::string& what);

sockaddr_un make_address(const std::string& path);
UniqueFd connect_to(const std::string& path);

// False if the peer closed before the first byte; IoError if it did later, or was silent for the socket's timeout.
bool receive(int fd, void* data, size_t bytes);
void receive_rest(int fd, void* data, size_t bytes);  // the end of a message that has begun: closing is an error
void send_all(int fd, const void* data, size_t bytes);

}  // namespace protocol
