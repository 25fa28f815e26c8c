// An app that embeds a bundle: app MODEL.xml IMAGE [EXTENSION]. IMAGE: the bytes of the input. Prints the first output.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <openvino/openvino.hpp>

int main(int argc, char **argv) {
    ov::Core core;
    if (argc > 3) core.add_extension(argv[3]);
    ov::CompiledModel model = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32));
    ov::InferRequest request = model.create_infer_request();
    std::ifstream file(argv[2], std::ios::binary);
    const std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    ov::Tensor input = request.get_input_tensor();
    if (image.size() != input.get_byte_size()) return 1;
    std::copy(image.begin(), image.end(), static_cast<char *>(input.data()));
    request.infer();
    const ov::Tensor output = request.get_output_tensor();
    for (size_t i = 0; i < output.get_size(); i++) std::cout << output.data<float>()[i] << '\n';
}
