// Decoding of the outputs of detectors and segmenters, as in evm_deploy/tasks. The outputs have passed check_outputs.
#pragma once
#include "evm/evm.hpp"

namespace evm {

// Return the detections of image `i` of a batch, by falling score. place: of the image; null leaves boxes in pixels of the network's input.
std::vector<Detection> decode_detections(const Tensors &outputs, std::size_t i, const Selection &selection, const Geometry *place,
                                         const std::vector<std::string> &labels);

// Rows of two runs of a detector on the same images, paired as in Python's tasks.detection.align: for each output but `count`, the largest
// difference of a pair, infinite for NaN and Inf; and the share, 0..1, of rows that are in a pair. Rows of a pair agree within the tolerance;
// rows whose score is within it of nothing do not count.
struct Aligned {
    std::map<std::string, double> errors;
    double share = 1;
};
Aligned align_detections(const Tensors &expected, const Tensors &actual, double tolerance);

}  // namespace evm
