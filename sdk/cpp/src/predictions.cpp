#include "predictions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace evm {
namespace {

constexpr double SAME = 0.5;  // intersection over union from which two boxes of a class are the same detection

// A row of a detector's outputs: corners in pixels of the network's input. at: number of the row in the batch.
struct Row {
    std::array<float, 4> box;
    float score;
    std::int32_t label;
    std::size_t at;
};

// Return the rows of image `i` that hold a detection, or a candidate where there is no count. scored: only those with a positive score.
std::vector<Row> rows_of(const Tensors &outputs, std::size_t i, bool scored) {
    const Tensor &boxes = outputs.at("boxes");
    const auto count = outputs.find("count");
    const std::size_t rows = static_cast<std::size_t>(boxes.shape[1]);
    std::vector<Row> found;
    for (std::size_t row = 0; row < rows; row++) {
        if (count != outputs.end() && static_cast<std::int64_t>(row) >= count->second.data<std::int32_t>()[i]) break;
        Row each{{}, outputs.at("scores").data<float>()[i * rows + row], outputs.at("labels").data<std::int32_t>()[i * rows + row], i * rows + row};
        std::copy_n(boxes.data<float>() + 4 * (i * rows + row), 4, each.box.begin());
        if (each.label >= 0 && (each.score > 0 || !scored)) found.push_back(each);
    }
    return found;
}

// Intersection over union of two boxes; 0 for empty boxes.
template <class T>
T overlap(const std::array<T, 4> &a, const std::array<T, 4> &b) {
    const T width = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), T(0)), height = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]), T(0));
    const T inter = width * height, sum = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]), all = sum - inter;
    return inter / (all > 0 ? all : T(1));
}

// Greedy non-maximum suppression of each class, in float32 as in Python: boxes of different classes are shifted apart.
std::vector<Row> suppressed(const std::vector<Row> &rows, const Selection &selection) {
    float largest = 0;
    for (const Row &row : rows) largest = std::max(largest, *std::max_element(row.box.begin(), row.box.end()));
    const float step = static_cast<float>(static_cast<double>(largest) + 1), limit = static_cast<float>(selection.iou);
    std::vector<std::array<float, 4>> apart;
    for (const Row &row : rows) {
        apart.push_back(row.box);
        for (float &side : apart.back()) side += static_cast<float>(row.label) * step;
    }
    std::vector<std::size_t> order(rows.size()), kept;
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return rows[a].score > rows[b].score; });
    for (const std::size_t i : order) {
        if (kept.size() == static_cast<std::size_t>(selection.max_det)) break;
        if (std::none_of(kept.begin(), kept.end(), [&](std::size_t k) { return overlap(apart[k], apart[i]) > limit; })) kept.push_back(i);
    }
    std::vector<Row> found;
    for (const std::size_t i : kept) found.push_back(rows[i]);
    return found;
}

// Clip boxes to the part of the input that shows the image, and leave out those that become empty.
std::vector<Row> clipped(const std::vector<Row> &rows, const Geometry &place) {
    const std::array<int, 4> content = place.content();
    std::vector<Row> found;
    for (Row row : rows) {
        for (std::size_t side = 0; side < 4; side++) {
            const std::size_t axis = 1 - side % 2;
            row.box[side] = std::min(std::max(row.box[side], static_cast<float>(content[axis])), static_cast<float>(content[axis + 2]));
        }
        if (row.box[2] > row.box[0] && row.box[3] > row.box[1]) found.push_back(row);
    }
    return found;
}

// Pairs of rows that are the same detection: the same label, an overlap of at least SAME, and scores and corners that agree within the
// tolerance, that of corners relative to the largest. Each row is in one pair; the nearest pairs come first.
std::vector<std::pair<Row, Row>> matches(const std::vector<Row> &a, const std::vector<Row> &b, double tolerance) {
    const auto exact = [](const Row &row) { return std::array<double, 4>{row.box[0], row.box[1], row.box[2], row.box[3]}; };
    double largest = 1;
    for (const Row &row : a)
        for (const float side : row.box) largest = std::max(largest, std::abs(static_cast<double>(side)));
    std::vector<std::pair<double, std::pair<std::size_t, std::size_t>>> found;
    for (std::size_t i = 0; i < a.size(); i++)
        for (std::size_t j = 0; j < b.size(); j++) {
            const std::array<double, 4> box = exact(a[i]), other = exact(b[j]);
            const double apart = std::abs(static_cast<double>(a[i].score) - b[j].score), share = overlap(box, other);
            bool same = a[i].label == b[j].label && share >= SAME && apart <= tolerance;
            for (std::size_t side = 0; side < 4; side++) same = same && std::abs(box[side] - other[side]) <= tolerance * largest;
            if (same) found.push_back({apart - share, {i, j}});
        }
    std::stable_sort(found.begin(), found.end(), [](const auto &x, const auto &y) { return x.first < y.first; });
    std::vector<bool> ours(a.size()), theirs(b.size());
    std::vector<std::pair<Row, Row>> pairs;
    for (const auto &each : found) {
        const auto [i, j] = each.second;
        if (ours[i] || theirs[j]) continue;
        ours[i] = theirs[j] = true;
        pairs.push_back({a[i], b[j]});
    }
    return pairs;
}

// Largest difference of the values of a row of two tensors (images, rows, ..), infinite for NaN and Inf.
double difference(const Tensor &one, const Tensor &other, std::size_t row, std::size_t other_row) {
    const std::size_t count = one.bytes.size() / sizeof(float) / static_cast<std::size_t>(one.shape[0] * one.shape[1]);
    double most = 0;
    for (std::size_t i = 0; i < count; i++) {
        const double off = std::abs(static_cast<double>(one.data<float>()[count * row + i]) - other.data<float>()[count * other_row + i]);
        most = std::max(most, std::isfinite(off) ? off : HUGE_VAL);
    }
    return most;
}

}  // namespace

std::vector<Detection> decode_detections(const Tensors &outputs, std::size_t i, const Selection &selection, const Geometry *place,
                                         const std::vector<std::string> &labels) {
    std::vector<Row> rows = rows_of(outputs, i, true);
    if (place) rows = clipped(rows, *place);
    if (!outputs.count("count")) rows = suppressed(rows, selection);
    std::vector<Detection> found;
    for (const Row &row : rows) {
        const std::size_t label = static_cast<std::size_t>(row.label);
        const Box box{row.box[0], row.box[1], row.box[2], row.box[3]};
        found.push_back({label < labels.size() ? labels[label] : "class " + std::to_string(row.label), row.label, row.score, place ? place->to_image(box) : box});
    }
    return found;
}

Aligned align_detections(const Tensors &expected, const Tensors &actual, double tolerance) {
    Aligned aligned;
    for (const auto &output : expected)
        if (output.first != "count") aligned.errors[output.first] = 0;
    std::size_t paired = 0, rows = 0;
    const auto counts = [&](const Row &row) -> std::size_t { return !(row.score <= tolerance); };  // NaN counts
    for (std::size_t i = 0; i < static_cast<std::size_t>(expected.at("boxes").shape[0]); i++) {
        const std::vector<Row> ours = rows_of(expected, i, false), theirs = rows_of(actual, i, false);
        for (const Row &row : ours) rows += counts(row);
        for (const Row &row : theirs) rows += counts(row);
        for (const auto &[row, other] : matches(ours, theirs, tolerance)) {
            paired += counts(row) + counts(other);
            for (auto &[name, error] : aligned.errors)
                if (name != "labels") error = std::max(error, difference(expected.at(name), actual.at(name), row.at, other.at));  // labels are equal
        }
    }
    if (rows) aligned.share = static_cast<double>(paired) / static_cast<double>(rows);
    return aligned;
}

Box Geometry::to_image(const Box &box) const {
    Box found{};
    for (std::size_t side = 0; side < 4; side++) {
        const std::size_t axis = 1 - side % 2;
        found[side] = (box[side] - offset[axis]) / (static_cast<double>(resized[axis]) / original[axis]);
    }
    return found;
}

Tensor Geometry::to_image(const Tensor &labels) const {
    const std::size_t width = labels.dtype == "uint8" ? 1 : sizeof(std::int32_t);
    const std::array<int, 4> shown = content();
    std::array<std::vector<std::size_t>, 2> from;  // rows and columns of the input
    for (std::size_t axis = 0; axis < 2; axis++)
        for (std::int64_t i = 0; i < original[axis]; i++) {
            const std::int64_t at = (2 * i + 1) * resized[axis] / (2 * std::int64_t{original[axis]}) + offset[axis];
            from[axis].push_back(static_cast<std::size_t>(std::clamp<std::int64_t>(at, shown[axis], shown[axis + 2] - 1)));
        }
    Tensor found{labels.dtype, {original[0], original[1]}, std::vector<unsigned char>(width * from[0].size() * from[1].size())};
    unsigned char *to = found.bytes.data();
    for (const std::size_t y : from[0])
        for (const std::size_t x : from[1]) {
            std::memcpy(to, &labels.bytes[width * (y * static_cast<std::size_t>(size[1]) + x)], width);
            to += width;
        }
    return found;
}

}  // namespace evm
