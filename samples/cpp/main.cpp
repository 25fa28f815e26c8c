// evm-classify: the command evm-run in C++, with the same flags, output and exit codes.
#include "draw.h"
#include "image.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace {

constexpr const char *USAGE =
    "usage: evm-classify BUNDLE [IMAGE ..] [--top K] [--selftest] [--bench] [--threads N] [--scan auto|plugin|bundled|portable]\n"
    "                    [--plugin LIBRARY] [--device D] [--cache DIR] [--batch N] [--seconds S] [--json]\n"
    "                    [--require-signature PUB] [--min-score X] [--save DIR]\n"
    "Prints the classes of the images, their detections, or the shares of the classes of their label maps, as the bundle gives them.\n"
    "--min-score: smallest score of the detections that are printed and drawn, default 0.3. --save: folder for copies of the images with\n"
    "detections or label maps drawn on them.\n"
    "exit codes: 0 ok, 1 internal error, 2 wrong usage, bundle or image, 3 runtime missing, 4 self-test failed\n";
constexpr size_t AT_ONCE = 16;  // number of images in memory at the same time

struct Arguments {
    std::string bundle;
    std::vector<std::string> images;
    std::string save;
    double min_score = 0.3;
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

double score(const std::string &flag, const std::string &text) {
    char *end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end || !(value >= 0 && value <= 1)) throw evm::UsageError(flag + " " + text + ": use a score from 0 to 1");
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
        else if (flag == "--min-score") args.min_score = score(flag, take());
        else if (flag == "--save") args.save = take();
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

std::string formatted(const char *format, double value) {
    char text[64];
    std::snprintf(text, sizeof text, format, value);
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

// Format the members of a JSON object that name a class.
std::string named(const std::string &label, int index) { return "{\"label\": " + quoted(label) + ", \"index\": " + std::to_string(index); }

// The answer for an image: lines to print, and its members of a JSON object.
struct Answer {
    std::string lines, json;
};

Answer answer_of(const std::vector<evm::Prediction> &top) {
    std::string lines;
    std::vector<std::string> parts;
    for (const evm::Prediction &p : top) {
        parts.push_back(named(p.label, p.index) + ", \"score\": " + precise(p.score) + "}");
        lines += formatted("\n  %6.2f%%  ", 100 * p.score) + p.label;
    }
    return {lines, "\"top\": " + listed(parts)};
}

Answer answer_of(const std::vector<evm::Detection> &found) {
    std::string lines = found.empty() ? ": no detections" : "";
    std::vector<std::string> parts;
    for (const evm::Detection &d : found) {
        const char *const sides[] = {"x1", "y1", "x2", "y2"};
        std::string box, corners;
        for (size_t i = 0; i < 4; i++) {
            box += std::string(i ? ", \"" : "\"") + sides[i] + "\": " + precise(d.box[i]);
            corners += formatted(" %.1f", d.box[i]);
        }
        parts.push_back(named(d.label, d.index) + ", \"score\": " + precise(d.score) + ", \"box\": {" + box + "}}");
        lines += formatted("\n  %6.2f%%  ", 100 * d.score) + d.label + " " + corners;
    }
    return {lines, "\"detections\": " + listed(parts)};
}

Answer answer_of(const evm::LabelMap &found, const std::vector<std::string> &labels) {
    std::map<int, double> counts;
    for (int y = 0; y < found.height(); y++)
        for (int x = 0; x < found.width(); x++) counts[found.at(x, y)]++;
    std::vector<std::pair<int, double>> order(counts.begin(), counts.end());
    std::stable_sort(order.begin(), order.end(), [](const auto &a, const auto &b) { return a.second > b.second; });
    std::string lines;
    std::vector<std::string> parts;
    for (const auto &[index, count] : order) {
        const double share = count / found.height() / found.width();
        const std::string label = static_cast<size_t>(index) < labels.size() ? labels[static_cast<size_t>(index)] : "class " + std::to_string(index);
        parts.push_back(named(label, index) + ", \"share\": " + precise(share) + "}");
        lines += formatted("\n  %6.2f%%  ", 100 * share) + label;
    }
    return {lines, "\"classes\": " + listed(parts)};
}

// Return the answers for images, and draw them on the images. Detections below the smallest score are left out.
std::vector<Answer> answers(const evm::Model &model, const Arguments &args, std::vector<RgbImage> &rgb_images) {
    std::vector<evm::Image> views;
    std::vector<Answer> found;
    for (const RgbImage &rgb_image : rgb_images) views.push_back(rgb_image.view());
    if (model.manifest().head == "detections") {
        for (std::vector<evm::Detection> &each : model.detect(views)) {
            each.erase(std::remove_if(each.begin(), each.end(), [&](const evm::Detection &d) { return d.score < args.min_score; }), each.end());
            draw(rgb_images[found.size()], each);
            found.push_back(answer_of(each));
        }
    } else if (model.manifest().head == "label_map") {
        for (const evm::LabelMap &each : model.segment(views)) {
            draw(rgb_images[found.size()], each, model.manifest().palette);
            found.push_back(answer_of(each, model.labels()));
        }
    } else {
        for (const std::vector<evm::Prediction> &each : model.classify(views, args.top)) found.push_back(answer_of(each));
    }
    return found;
}

// Print the answers for the images [first, last) of the arguments, or add them to `rows`. Returns whether all could be read. An image
// that cannot be read costs no other: its part is halved until it is alone.
bool predict(const evm::Model &model, const Arguments &args, size_t first, size_t last, std::vector<std::string> &rows) {
    try {
        std::vector<RgbImage> rgb_images;
        for (size_t i = first; i < last; i++) rgb_images.push_back(read_image(args.images[i]));
        const std::vector<Answer> found = answers(model, args, rgb_images);
        for (size_t i = 0; i < found.size(); i++) {
            const std::string &name = args.images[first + i];
            std::string saved;
            if (!args.save.empty()) saved = ", \"saved\": " + quoted(save(rgb_images[i], args.save).string());
            rows.push_back("{\"image\": " + quoted(name) + ", " + found[i].json + saved + "}");
            if (!args.json) std::printf("%s%s\n", name.c_str(), found[i].lines.c_str());
        }
        return true;
    } catch (const evm::ImageError &error) {
        const size_t middle = first + (last - first) / 2;
        if (middle > first) {
            const bool good = predict(model, args, first, middle, rows);
            return predict(model, args, middle, last, rows) && good;
        }
        std::cerr << "evm-classify: " << error.what() << '\n';
        rows.push_back("{\"image\": " + quoted(args.images[first]) + ", \"error\": " + quoted(error.what()) + "}");
        return false;
    }
}

bool predict(const evm::Model &model, const Arguments &args) {
    const bool draws = model.manifest().head == "detections" || model.manifest().head == "label_map";
    if (!args.save.empty() && !draws)
        throw evm::UsageError("--save draws boxes and label maps: the bundle gives " + model.manifest().head, "leave --save out");
    std::vector<std::string> rows;
    bool good = true;
    for (size_t start = 0; start < args.images.size(); start += AT_ONCE)
        good = predict(model, args, start, std::min(start + AT_ONCE, args.images.size()), rows) && good;
    if (args.json) std::printf("%s\n", listed(rows).c_str());
    return good;
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
    return args.images.empty() || predict(model, args) ? 0 : 2;
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
