// A load generator that checks every reply against the reference.
#pragma once

#include <string>

#include "safetensors.hpp"

struct ClientOptions {
  std::string socket_path;
  std::string layer;   // empty: all layers of the file in turn
  int m = 4;           // rows of x
  int requests = 100;  // per connection
  int connections = 1;
  double tolerance = 1e-6;  // of ||y - reference|| / ||reference||
};

// Sends the requests, prints requests/s and the largest error, and returns whether all replies were right.
bool run_client(const safetensors::MappedFile& file, const ClientOptions& options);

// Asks the server to stop.
void request_shutdown(const std::string& socket_path);
