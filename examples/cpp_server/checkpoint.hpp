// Quantized layers of a checkpoint that `pyquant quantize` wrote. The tensors of a layer <p> are named
// <p>.weight.quant_spec, <p>.weight.codes, <p>.weight.scales, ... and <p>.bias; the README lists them.
#pragma once

#include <string>
#include <vector>

#include "cutlass_ext/cutlass_ext.hpp"
#include "safetensors.hpp"

// Names of the quantized layers, sorted. A file without one is an error.
std::vector<std::string> quantized_layers(const safetensors::MappedFile& file);

// One canonical weight with its bias. The codes stay in the file, which must outlive this; the other parts are small
// and copied, because a file may hold them at odd addresses.
class CanonicalLayer {
 public:
  // Throws FileError or cutlass_ext::Error, naming file and layer, if a tensor is missing, superfluous, or not of the
  // dtype and shape that quant_spec asks for.
  CanonicalLayer(const safetensors::MappedFile& file, const std::string& name);
  CanonicalLayer(CanonicalLayer&&) = default;  // and no copies: the pointers of weight_ go with copies_

  const cx_weight& weight() const { return weight_; }
  const std::vector<float>& bias() const { return bias_; }  // empty if the layer has none

 private:
  void load(const safetensors::Contents& contents, const std::string& name);
  void* copy(const safetensors::Tensor& tensor);

  cx_weight weight_{};
  std::vector<cutlass_ext::AlignedBuffer> copies_;
  std::vector<float> bias_;
};
