// Runs a package of export.py: libtorch, the operators of pyquant, no Python.
//
//   aoti_runner model.pt2 _torch_ops.so x.bin y.bin [cpu|cuda]
//
// x.bin holds fp32 rows of 256 values; y.bin gets as many.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kFeatures = 256;

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int run(const std::vector<std::string>& arguments) {
  if (arguments.size() < 4) {
    std::cerr << "usage: aoti_runner model.pt2 _torch_ops.so x.bin y.bin [cpu|cuda]\n";
    return 2;
  }
  // Registers torch.ops.pyquant with libtorch; the package calls it by name. Never closed: its operators stay
  // registered.
  if (dlopen(arguments[1].c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());

  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[0]);
  std::vector<char> bytes = read_file(arguments[2]);
  const int64_t rows = static_cast<int64_t>(bytes.size() / (kFeatures * sizeof(float)));
  if (rows < 1 || bytes.size() != rows * kFeatures * sizeof(float)) {
    throw std::runtime_error(arguments[2] + ": expected rows of 256 fp32 values, got " + std::to_string(bytes.size()) +
                             " bytes");
  }
  const at::Device device(arguments.size() > 4 ? arguments[4] : "cpu");
  const at::Tensor x = at::from_blob(bytes.data(), {rows, kFeatures}, at::kFloat).to(device);
  const at::Tensor y = model.run({x}).at(0).to(at::kCPU).contiguous();

  std::ofstream file(arguments[3], std::ios::binary);
  file.write(static_cast<const char*>(y.const_data_ptr()), static_cast<std::streamsize>(y.nbytes()));
  if (!file.flush()) throw std::runtime_error(arguments[3] + ": cannot be written");
  std::cout << "y: " << y.sizes() << '\n';
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "aoti_runner: " << error.what() << '\n';
    return 1;
  }
}
