// Test driver for tests/test_sdk_cpp.py, which runs many cases in one process, so that sanitizers see all of them. It reads commands from
// stdin, one per line, and writes an answer to stdout for each: `ok ..`, or `error: ` and the kind, code, place and text of an evm::Error,
// separated by tabs, or `reason: ` and the text of another exception. Newlines are written as `|`.
//
//   image FILE OUT                            decode as the sample does; OUT: the RGB bytes. ok W H
//   pixels H W CROP INTERPOLATION FILE OUT      preprocess a file; OUT: the pixels. ok
//   normalised H W FILE OUT                     preprocess and normalise with ImageNet's mean; OUT: float32. ok
//   json FILE, safetensors FILE, png FILE       read a file that may be damaged. ok
//   open BUNDLE SCAN                            open a bundle. ok NAME
//   signed BUNDLE KEY                           open a bundle that this public key must have signed. ok NAME
//   word TEXT                                   quote for a shell. ok WORD
//   predictions FILE OUT                        decode the cases of sdk/vectors/predictions.json; OUT: JSON. ok
//   classify BUNDLE                             a white image. ok INDEX
//   selftest BUNDLE                             ok PASSED or FAILED
//   overflow, race                              make an error that AddressSanitizer or ThreadSanitizer reports
//   threads BUNDLE SCAN N FILE..                each of N threads classifies all files, in its own order; ok if all agree
#include "../../../samples/cpp/image.h"
#include "../src/json.h"
#include "../src/png.h"
#include "../src/predictions.h"
#include "../src/safetensors.h"
#include "../src/text.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <sstream>
#include <thread>

namespace {

using Words = std::vector<std::string>;

std::string bytes_of(const std::string &file) {
    std::ifstream stream(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

void write(const std::string &file, const void *data, size_t size) {
    std::ofstream(file, std::ios::binary).write(static_cast<const char *>(data), static_cast<std::streamsize>(size));
}

std::string image(const Words &words) {
    const RgbImage found = read_image(words.at(1));
    write(words.at(2), found.rgb.data(), found.rgb.size());
    return std::to_string(found.width) + " " + std::to_string(found.height);
}

// Numbers with commas between them.
std::vector<double> numbers(const std::string &text) {
    std::vector<double> found;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) found.push_back(std::stod(part));
    return found;
}

evm::Preprocessing sized(const Words &words) {
    evm::Preprocessing spec;
    spec.height = std::stoi(words.at(1)), spec.width = std::stoi(words.at(2));
    return spec;
}

std::string pixels(const Words &words) {
    evm::Preprocessing spec = sized(words);
    spec.crop_pct = std::stod(words.at(3)), spec.interpolation = words.at(4), spec.resize = words.at(5);
    spec.mean = numbers(words.at(6)), spec.std_dev = std::vector<double>(spec.mean.size(), 0.25);
    const std::vector<std::uint8_t> found = spec.pixels(read_image(words.at(7)).view());
    write(words.at(8), found.data(), found.size());
    return "";
}

std::string normalised(const Words &words) {
    const evm::Preprocessing spec = sized(words);
    const std::vector<float> found = spec.normalise(spec.pixels(read_image(words.at(3)).view()));
    write(words.at(4), found.data(), found.size() * sizeof(float));
    return "";
}

std::string open(const Words &words) {
    evm::Options options;
    options.scan = words.at(2), options.threads = 1;
    return evm::Model(words.at(1), options).manifest().name;
}

std::string signed_bundle(const Words &words) {
    evm::Options options;
    options.require_signature = words.at(2);
    return evm::Model(words.at(1), options).manifest().name;
}

template <class T>
evm::Tensor tensor_of(const char *dtype, std::vector<std::int64_t> shape, const std::vector<T> &values) {
    const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(values.data());
    return {dtype, std::move(shape), {bytes, bytes + values.size() * sizeof(T)}};
}

// The place of a case's image, which the SDK computes from the preprocessing.
evm::Geometry place_of(const evm::Json &given) {
    const evm::Json &facts = given.at("preprocessing");
    evm::Preprocessing spec;
    spec.height = facts.at("size")[0], spec.width = facts.at("size")[1];
    spec.resize = facts.at("resize"), spec.crop_pct = facts.value("crop_pct", 1.0);
    return spec.geometry(given.at("image")[1], given.at("image")[0]);
}

evm::Json detected(const evm::Json &given) {
    const evm::Json &outputs = given.at("outputs");
    std::vector<float> boxes;
    for (const evm::Json &box : outputs.at("boxes"))
        for (const evm::Json &side : box) boxes.push_back(side);
    const std::int64_t rows = static_cast<std::int64_t>(boxes.size()) / 4;
    evm::Tensors tensors{{"boxes", tensor_of("float32", {1, rows, 4}, boxes)},
                         {"scores", tensor_of("float32", {1, rows}, outputs.at("scores").get<std::vector<float>>())},
                         {"labels", tensor_of("int32", {1, rows}, outputs.at("labels").get<std::vector<std::int32_t>>())}};
    if (outputs.contains("count")) tensors["count"] = tensor_of("int32", {1}, std::vector<std::int32_t>{outputs.at("count")});
    const evm::Geometry place = place_of(given);
    evm::Json found{{"resized", place.resized}, {"offset", place.offset}, {"boxes", evm::Json::array()}, {"scores", evm::Json::array()}, {"labels", evm::Json::array()}};
    for (const evm::Detection &each : evm::decode_detections(tensors, 0, {given.at("iou"), given.at("max_det")}, &place, {})) {
        found["boxes"].push_back(each.box), found["scores"].push_back(each.score), found["labels"].push_back(each.index);
    }
    return found;
}

evm::Json segmented(const evm::Json &given) {
    const std::vector<std::vector<std::int32_t>> rows = given.at("map");
    evm::Tensor map{given.at("dtype"), {static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(rows[0].size())}, {}};
    for (const std::vector<std::int32_t> &row : rows)
        for (const std::int32_t value : row) {
            const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(&value);
            map.bytes.insert(map.bytes.end(), bytes, bytes + (map.dtype == "uint8" ? 1 : 4));
        }
    const evm::LabelMap found{place_of(given).to_image(map)};
    evm::Json result = evm::Json::array();
    for (int y = 0; y < found.height(); y++) {
        result.push_back(evm::Json::array());
        for (int x = 0; x < found.width(); x++) result.back().push_back(found.at(x, y));
    }
    return result;
}

std::string predictions(const Words &words) {
    const evm::Json given = evm::parse_json(bytes_of(words.at(1)));
    evm::Json found{{"detections", evm::Json::array()}, {"label_maps", evm::Json::array()}};
    for (const evm::Json &each : given.at("detections")) found["detections"].push_back(detected(each));
    for (const evm::Json &each : given.at("label_maps")) found["label_maps"].push_back(segmented(each));
    const std::string text = found.dump();
    write(words.at(2), text.data(), text.size());
    return "";
}

std::string classify(const Words &words) {
    const std::uint8_t white[3] = {255, 255, 255};
    return std::to_string(evm::Model(words.at(1)).classify(white, 1, 1, 1).at(0).index);
}

std::string selftest(const Words &words) {
    const std::vector<evm::Check> checks = evm::Model(words.at(1)).selftest();
    return std::all_of(checks.begin(), checks.end(), [](const evm::Check &check) { return check.ok(); }) ? "PASSED" : "FAILED";
}

std::string threads(const Words &words) {
    evm::Options options;
    options.scan = words.at(2), options.threads = 1;
    const evm::Model model(words.at(1), options);
    std::vector<RgbImage> images;
    for (size_t i = 4; i < words.size(); i++) images.push_back(read_image(words[i]));
    const auto scores = [&](const RgbImage &image) {
        std::vector<double> result;
        for (const evm::Prediction &p : model.classify(image.rgb.data(), image.width, image.height, 5)) result.push_back(p.index + p.score);
        return result;
    };
    std::vector<std::vector<double>> expected;
    for (const RgbImage &image : images) expected.push_back(scores(image));
    const size_t count = std::stoul(words.at(3));
    std::vector<int> wrong(count);
    std::vector<std::thread> running;
    for (size_t t = 0; t < count; t++)
        running.emplace_back([&, t] {
            for (size_t i = 0; i < images.size(); i++) {
                const size_t at = (i + t) % images.size();
                wrong[t] += scores(images[at]) != expected[at];
            }
        });
    for (std::thread &thread : running) thread.join();
    return std::to_string(std::count_if(wrong.begin(), wrong.end(), [](int n) { return n > 0; })) + " threads differ";
}

// Errors that sanitizers must report: a check that the sanitizers are on.
std::string overflow(const Words &words) {
    const std::vector<char> bytes(words.size());
    const volatile char *const end = bytes.data();
    return std::to_string(end[words.size()]);
}

std::string race(const Words &) {
    int count = 0;
    std::thread one([&] { count++; }), other([&] { count++; });
    one.join(), other.join();
    return std::to_string(count);
}

std::string kind(const evm::Error &error) {
    if (dynamic_cast<const evm::BundleError *>(&error)) return "BundleError";
    if (dynamic_cast<const evm::UsageError *>(&error)) return "UsageError";
    return dynamic_cast<const evm::ImageError *>(&error) ? "ImageError" : "ToolchainError";
}

const std::map<std::string, std::function<std::string(const Words &)>> COMMANDS{
    {"image", image},
    {"pixels", pixels},
    {"normalised", normalised},
    {"json", [](const Words &words) { return evm::parse_json(bytes_of(words.at(1))).type_name(); }},
    {"safetensors", [](const Words &words) { return std::to_string(evm::read_safetensors(bytes_of(words.at(1))).size()); }},
    {"png", [](const Words &words) { return std::to_string(evm::read_png(bytes_of(words.at(1))).width); }},
    {"open", open},
    {"signed", signed_bundle},
    {"predictions", predictions},
    {"word", [](const Words &words) { return evm::shell_word(words.at(1)); }},
    {"classify", classify},
    {"selftest", selftest},
    {"threads", threads},
    {"overflow", overflow},
    {"race", race},
};

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream stream(line);
        Words words;
        for (std::string word; std::getline(stream, word, '\t');) words.push_back(word);
        std::string answer;
        try {
            answer = "ok " + COMMANDS.at(words.at(0))(words);
        } catch (const evm::Error &error) {
            answer = "error: " + kind(error) + "\t" + error.code() + "\t" + error.where() + "\t" + error.what();
        } catch (const std::runtime_error &error) {  // an internal error, which the SDK turns into an evm::Error
            answer = std::string("reason: ") + error.what();
        }
        std::replace(answer.begin(), answer.end(), '\n', '|');
        std::cout << answer << std::endl;
    }
}
