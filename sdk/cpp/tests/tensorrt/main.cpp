// Test of the TensorRT component against stand-ins. argv[1] is an empty folder. Prints the failed checks, or `ok`.
#include "../../src/tensorrt.cpp"

#include <cstdio>
#include <fstream>
#include <thread>

namespace {

int failures = 0;

void expect(bool right, const char *what) {
    if (!right) failures++, std::printf("wrong: %s\n", what);
}

std::string message_of(const std::function<void()> &body) {
    try {
        body();
    } catch (const evm::Error &error) {
        return error.what();
    }
    return "";
}

void write(const std::string &file, const std::string &bytes) { std::ofstream(file, std::ios::binary) << bytes; }

std::vector<float> logits_of(const evm::Runtime &runtime, const std::vector<unsigned char> &images) {
    const evm::TensorView value{"uint8", {static_cast<std::int64_t>(images.size() / 6), 2, 3}, images.data()};
    const evm::Tensor found = runtime.run({{"image", value}}).at("logits");
    return {found.data<float>(), found.data<float>() + found.bytes.size() / sizeof(float)};
}

}  // namespace

int main(int, char **argv) {
    const std::string folder = argv[1];
    write(folder + "/plain", "ENGINE");
    write(folder + "/marked", std::string("\x02\0\0\0{}ENGINE", 12));
    write(folder + "/damaged", "ENGINX");
    const std::unique_ptr<evm::Source> source = evm::open_source(folder);
    for (const char *name : {"plain", "marked"}) {
        const std::unique_ptr<evm::Runtime> runtime = evm::open_tensorrt(*source, name, {});
        expect(runtime->inputs.at(0).dtype == "uint8" && runtime->inputs.at(0).shape == std::vector<std::int64_t>{-1, 2, 3}, "inputs");
        expect(logits_of(*runtime, {1, 2, 3, 4, 5, 6}) == std::vector<float>{21, 1}, "one image");
        expect(logits_of(*runtime, {9, 0, 0, 0, 0, 0, 7, 1, 1, 1, 1, 1}) == std::vector<float>{9, 9, 12, 7}, "more memory for two");
        expect(logits_of(*runtime, {1, 2, 3, 4, 5, 6}) == std::vector<float>{21, 1}, "one image again");
        std::vector<std::thread> threads;
        std::vector<int> wrong(4);
        for (unsigned char t = 0; t < 4; t++)
            threads.emplace_back([&, t] {
                for (int i = 0; i < 200; i++) wrong[t] += logits_of(*runtime, {t, 0, 0, 0, 0, 1}) != std::vector<float>{t + 1.f, float(t)};
            });
        for (std::thread &thread : threads) thread.join();
        expect(wrong == std::vector<int>(4), "four threads");
        expect(message_of([&] { logits_of(*runtime, std::vector<unsigned char>(30)); }) == "the engine does not take image[5, 2, 3]", "batch");
    }
    expect(fake::allocations == 0, "memory is freed");
    const std::string rebuild = "\n  an engine fits one TensorRT release and one kind of GPU; build it on this device: evm-export --finish BUNDLE";
    expect(message_of([&] { evm::open_tensorrt(*source, "damaged", {}); }) == folder + "/damaged cannot be opened: bad magic" + rebuild, "damaged");
    evm::Options options;
    options.plugin = "!none";
    expect(message_of([&] { evm::open_tensorrt(*source, "plain", options); }) == "TensorRT refuses !none: TensorRT gave no reason", "plugin");
    options = {};
    options.threads = 1;
    expect(message_of([&] { evm::open_tensorrt(*source, "plain", options); }).rfind("TensorRT takes no threads", 0) == 0, "threads");
    fake::out_of_memory = true;
    const auto starved = [&] { logits_of(*evm::open_tensorrt(*source, "plain", {}), {1, 2, 3, 4, 5, 6}); };
    expect(message_of(starved).rfind("CUDA: cudaErrorMemoryAllocation", 0) == 0, "out of memory");
    if (!failures) std::puts("ok");
    return failures;
}
