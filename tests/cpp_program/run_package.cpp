// Runs a quantized model, and an operator, without Python: run_package MODEL.pt2 INPUT.pt OUTPUT.pt
// INPUT.pt and OUTPUT.pt hold one tensor each, as torch.save and torch.load have them. docs/cpp.md explains the lines.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>

// The rows' codes, scales and zero points, from the dispatcher.
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x, bool asymmetric) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quant_ops::quantize_rows", "")
                             .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, bool)>();
  return op.call(x, asymmetric);
}

at::Tensor load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}}).toTensor();
}

void save(const at::Tensor& tensor, const char* path) {
  const std::vector<char> bytes = torch::pickle_save(tensor);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run_package MODEL.pt2 INPUT.pt OUTPUT.pt\n";
    return 2;
  }
  const at::Tensor x = load(arguments[2]);
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  save(model.run({x}).at(0), arguments[3]);
  const auto [codes, scale, zero_point] = quantize_rows(x, false);
  std::cout << codes.sum().item<int64_t>() << "\n";
}
