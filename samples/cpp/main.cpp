// evm-classify: the command evm-run in C++, with the same flags, output and exit codes.
#include "image.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace {

constexpr const char *USAGE =
    "usage: evm-classify BUNDLE [IMAGE ..] [--top K] [--selftest] [--bench] [--threads N] [--scan auto|plugin|bundled|portable]\n"
    "                    [--plugin LIBRARY] [--device D] [--cache DIR] [--batch N] [--seconds S] [--json]\n"
    "                    [--require-signature PUB]\n"
    "exit codes: 0 ok, 1 internal error, 2 wrong usage, bundle or image, 3 runtime missing, 4 self-test failed\n";
constexpr size_t AT_ONCE = 16;  // number of images in memory at the same time

struct Arguments {
    std::string bundle;
    std::vector<std::string> images;
    int top = 5;
    bool selftest = false, bench = false, json = false, help = false;
    evm::Options options;
    evm::BenchSettings timing;
};

int number(const std::string &flag, const std::string &text, int least) {
    const bool digits = !text.empty() && text.size() < 9 && text.find_first_not_of("-0123456789") == std::string::npos;
    const int value = digits ? std::atoi(text.c_str()) : least - 1;
    if (value < least) throw evm::UsageError(flag + " " + text + ": use a number from " + std::to_string(least));
    return value;
}

Arguments parse(const std::vector<std::string> &words) {
    Arguments args;
    for (size_t i = 0; i < words.size(); i++) {
        std::string flag = words[i], value;
        const size_t equals = flag.find('=');
        const auto take = [&]() -> const std::string & {
            if (equals == std::string::npos && ++i == words.size()) throw evm::UsageError("argument " + flag + ": expected one argument", "see  evm-classify --help");
            value = equals == std::string::npos ? words[i] : value;
            return value;
        };
        if (flag.rfind("--", 0) == 0 && equals != std::string::npos) value = flag.substr(equals + 1), flag.resize(equals);
        if (flag == "--help" || flag == "-h") args.help = true;
        else if (flag == "--selftest") args.selftest = true;
        else if (flag == "--bench") args.bench = true;
        else if (flag == "--json") args.json = true;
        else if (flag == "--top") args.top = number(flag, take(), 1);
        else if (flag == "--threads") args.options.threads = number(flag, take(), 1);
        else if (flag == "--batch") args.timing.batch = number(flag, take(), 1);
        else if (flag == "--seconds") args.timing.limit_s = number(flag, take(), 1);
        else if (flag == "--scan") args.options.scan = take();
        else if (flag == "--plugin") args.options.plugin = take();
        else if (flag == "--device") args.options.device = take();
        else if (flag == "--cache") args.options.cache = take();
        else if (flag == "--require-signature") args.options.require_signature = take();
        else if (flag.size() > 1 && flag[0] == '-') throw evm::UsageError("unrecognized arguments: " + words[i], "see  evm-classify --help");
        else if (args.bundle.empty()) args.bundle = words[i];
        else args.images.push_back(words[i]);
    }
    if (args.help) return args;
    if (args.bundle.empty()) throw evm::UsageError("the following arguments are required: BUNDLE", "see  evm-classify --help");
    if (args.images.empty() && !args.selftest && !args.bench) throw evm::UsageError("nothing to do", "give images, or --selftest");
    return args;
}

// Format a text as a JSON string.
std::string quoted(const std::string &text) {
    std::string result = "\"";
    for (const char c : text) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, c == '"' || c == '\\' ? "\\%c" : static_cast<unsigned char>(c) < 0x20 ? "\\u%04x" : "%c", c);
        result += escaped;
    }
    return result + '"';
}

std::string precise(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return text;
}

std::string listed(const std::vector<std::string> &rows) {
    std::string result;
    for (const std::string &row : rows) result += (result.empty() ? "\n " : ",\n ") + row;
    return "[" + result + "\n]";
}

bool selftest(const evm::Model &model, bool json) {
    const std::vector<evm::Check> checks = model.selftest();
    const bool passed = std::all_of(checks.begin(), checks.end(), [](const evm::Check &check) { return check.ok(); });
    const evm::Choice &scan = model.scan();
    std::vector<std::string> rows;
    for (const evm::Check &check : checks) {
        rows.push_back("{\"name\": " + quoted(check.name) + ", \"error\": " + precise(check.error) + ", \"limit\": " + precise(check.limit) +
                       ", \"ok\": " + (check.ok() ? "true}" : "false}"));
        if (!json) std::printf("%-32s %.1e  limit %.1e  %s\n", check.name.c_str(), check.error, check.limit, check.ok() ? "ok" : "FAILED");
    }
    if (json)
        std::printf("{\"passed\": %s, \"scan\": {\"value\": %s, \"reason\": %s}, \"checks\": %s}\n", passed ? "true" : "false",
                    quoted(scan.value).c_str(), quoted(scan.reason).c_str(), listed(rows).c_str());
    else std::printf("scans ran as %s: %s\n%s\n", scan.value.c_str(), scan.reason.c_str(), passed ? "PASSED" : "FAILED");
    return passed;
}

std::string row_of(const std::string &image, const std::vector<evm::Prediction> &top) {
    std::vector<std::string> parts;
    for (const evm::Prediction &p : top)
        parts.push_back("{\"label\": " + quoted(p.label) + ", \"index\": " + std::to_string(p.index) + ", \"score\": " + precise(p.score) + "}");
    return "{\"image\": " + quoted(image) + ", \"top\": " + listed(parts) + "}";
}

void classify(const evm::Model &model, const Arguments &args) {
    std::vector<std::string> rows;
    for (size_t start = 0; start < args.images.size(); start += AT_ONCE) {
        std::vector<RgbImage> rgb_images;
        std::vector<evm::Image> views;
        for (size_t i = start; i < std::min(start + AT_ONCE, args.images.size()); i++) rgb_images.push_back(read_image(args.images[i]));
        for (const RgbImage &rgb_image : rgb_images) views.push_back(rgb_image.view());
        const auto found = model.classify(views, args.top);
        for (size_t i = 0; i < found.size(); i++) {
            rows.push_back(row_of(args.images[start + i], found[i]));
            if (args.json) continue;
            std::printf("%s\n", args.images[start + i].c_str());
            for (const evm::Prediction &p : found[i]) std::printf("  %6.2f%%  %s\n", 100 * p.score, p.label.c_str());
        }
    }
    if (args.json) std::printf("%s\n", listed(rows).c_str());
}

void bench(const evm::Model &model, const Arguments &args) {
    const evm::Latency t = model.bench(args.timing);
    const char *const text = "p50 %.4f ms  p90 %.4f  p95 %.4f  p99 %.4f  mean %.4f  std %.4f  min %.4f  max %.4f  %zu runs%s\n";
    const char *const json = "{\"p50\": %.4f, \"p90\": %.4f, \"p95\": %.4f, \"p99\": %.4f, \"mean\": %.4f, \"std\": %.4f, \"min\": %.4f, "
                             "\"max\": %.4f, \"runs\": %zu, \"stable\": %s}\n";
    std::printf(args.json ? json : text, t.percentile(50), t.percentile(90), t.percentile(95), t.percentile(99), t.mean(), t.std_dev(), t.min(), t.max(),
                t.samples.size(), args.json ? t.stable ? "true" : "false" : t.stable ? "" : ", not stable");
}

int run(const Arguments &args) {
    const evm::Model model(args.bundle, args.options);
    if (args.options.scan == "auto" && model.scan().value == "portable")
        std::cerr << "scans run in their portable form: " << model.scan().reason << '\n';
    if (args.selftest && !selftest(model, args.json)) return 4;
    if (args.bench) bench(model, args);
    if (!args.images.empty()) classify(model, args);
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    try {
        const Arguments args = parse({argv + 1, argv + argc});
        if (args.help) return std::cout << USAGE, 0;
        return run(args);
    } catch (const evm::Error &error) {
        std::cerr << "evm-classify: " << error.what() << '\n';
        return error.exit_code();
    } catch (const std::exception &error) {
        std::cerr << "evm-classify: internal error: " << error.what() << '\n';
        return 1;
    }
}
