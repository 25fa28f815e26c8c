"""Declare the flags of evm-export."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from evm_deploy._util.settings import add_flags
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags
from evm_deploy.errors import UsageError
from evm_deploy.export import settings as target_settings
from evm_deploy.toolchain.platforms import PLATFORMS

FINISH_ONLY = {
    "library": "plugin library of a bundle exported with --scan plugin",
    "timing-cache": "TensorRT's timing cache, read and updated by each build",
    "require-signature": "refuse bundles not signed with this ed25519 key (a PEM file)",
}
FINISH_TOO = ("finish", "sign", "json", "verbose", "quiet", "config")  # other arguments that --finish uses


def weights_flags(add: Callable[..., object], default: str | None = "ema", of: str = "") -> None:
    """Add the flags that say which weights of a checkpoint are taken: --weights and --drop.

    add: `add_argument` of a parser or group. default: of --weights. of: begin of the help texts.
    """
    add(
        "--weights",
        default=default,
        metavar="W",
        help=f"{of}ema (default, if the file has averaged weights), raw, or the name of a set of weights in the file",
    )
    add("--drop", metavar="P[,P2..]", help=f"{of}patterns of keys to leave out, such as 'aux_head.*'")


def drop_patterns(text: str | None) -> tuple[str, ...]:
    """Parse the value of --drop: patterns with commas between them. Raises UsageError for an empty pattern."""
    patterns = tuple(each.strip() for each in text.split(",")) if text is not None else ()
    if not all(patterns):
        raise UsageError(f"--drop {text!r} has an empty pattern", "write patterns with commas: 'aux_head.*,loss.*'")
    return patterns


def export_parser() -> Parser:
    """Return the argument parser of evm-export."""
    parser = Parser(
        "evm-export",
        description="Export a trained EfficientVMamba checkpoint, or with --model another visual Mamba, to ONNX "
        "Runtime, OpenVINO, TensorRT or Core ML, as a verified bundle.",
        epilog="evm-export convert CKPT  writes a checkpoint of any layout to a safetensors file\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("input and model").add_argument
    model(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        help="checkpoint file of PyTorch or safetensors, whatever its suffix, or a ready-made .onnx file whose scans "
        "are com.depthart::SelectiveScan or --scan-op, or demo:detector, demo:segmenter; default: demo:digits",
    )
    weights_flags(model)
    model(
        "--model",
        metavar="MODULE:NAME",
        help="a network of your own: package.module:factory, file.py:factory, or timm:NAME; the code is run, in a "
        "process of its own; CKPT then holds its state dict",
    )
    model("--model-arg", metavar="K=V[,..]", help="with --model: arguments of the factory, as Python literals")
    model("--outputs", metavar="A,B", help="with --model or an ONNX file: names of the outputs, in order")
    model("--task", metavar="TASK", help="with --model or an ONNX file: raw (default), classification or features")
    model("--channels", metavar="N", help="with --model: channels of the network's input, default 3")
    model("--scan-op", metavar="DOMAIN::TYPE", help="with an ONNX file: its operator that is a selective scan")
    model(
        "--imgsz",
        metavar="N|HxW",
        help="input size in pixels: 224 or 224x288; Core ML also takes several: 192,224; default: the size saved with "
        "the weights, else 224",
    )
    model("--batch", default="1", metavar="N|dynamic|MIN:OPT:MAX", help="images per inference, default 1")
    model(
        "--input",
        default="image",
        metavar="KIND",
        help="image (default): uint8 NHWC RGB (grey for 1 channel, RGBA for 4), normalised inside the model; tensor: "
        "normalised float32 NCHW",
    )
    model(
        "--head",
        metavar="HEAD",
        help="output of a classifier: logits (default) or probs; features: NCHW feature maps of any network",
    )
    model(
        "--multi-label",
        action="store_true",
        help="the classes are independent (trained with a sigmoid): probabilities by sigmoid; implies --head probs",
    )
    model("--labels", metavar="FILE", help="class names, one per line, in the order of the model's outputs")

    group = parser.add_argument_group("target and precision")
    target = group.add_argument
    target(
        "--target",
        metavar="T[,T2..]",
        help="onnx: ONNX Runtime (aliases ort, onnxruntime); openvino: OpenVINO (ov); coreml: Core ML (apple, ios, "
        "mlpackage); trt: TensorRT (tensorrt, engine); trt-rtx: TensorRT-RTX (rtx); qnn: Qualcomm NPU (htp, "
        "snapdragon); litert: LiteRT (tflite); executorch: ExecuTorch (pte); or all",
    )
    precision = group.add_mutually_exclusive_group().add_argument
    precision(
        "--precision",
        metavar="P",
        help="fp32, fp16, int8, int8-fp16 (int8, the rest float16), or w8 (alias w8a16: weights int8, activations "
        "float); default fp32, for Core ML fp16",
    )
    for short in ("fp16", "int8"):
        precision(
            f"--{short}", dest="precision", action="store_const", const=short, help=f"same as --precision {short}"
        )
    target("--min-target", metavar="OS", help="Core ML: oldest system to support: iOS16, iOS17 (default), iOS18")

    accuracy = parser.add_argument_group("calibration and accuracy").add_argument
    accuracy(
        "--calib",
        metavar="DIR",
        help="images to calibrate int8, or to evaluate w8 without --val: folder, list of paths, .npz, or demo",
    )
    accuracy(
        "--calib-images",
        default="512",
        metavar="N",
        help="number of calibration images, chosen with a fixed seed, default 512",
    )
    accuracy(
        "--calib-method",
        default="mse",
        metavar="M",
        help="activation ranges: mse (default), minmax, percentile, entropy, or auto",
    )
    accuracy(
        "--smooth",
        default="auto",
        metavar="S",
        help="SmoothQuant for int8: on, off, or auto (default): on if accuracy is better",
    )
    accuracy(
        "--weight-bits",
        metavar="N",
        help="int8 weights of ONNX and OpenVINO in 8 bits (default), or in 7 for x86 CPUs without VNNI, whose kernels "
        "saturate with 8; by default --device chooses",
    )
    accuracy("--force-calib", action="store_true", help="calibrate with images that were found unsuitable")
    accuracy(
        "--val",
        metavar="PATH",
        help="labelled images to evaluate int8 or w8: class folders, list of path and class, .npz, or demo; of a "
        "detector a COCO JSON file, or a folder of VOC annotations; of a segmenter a folder with images/ and "
        "annotations/",
    )
    accuracy(
        "--max-drop",
        metavar="X",
        help="largest accepted drop of the main score on --val in points (classifier: top-1, detector: AP, segmenter: "
        "mIoU), default 1.0; exit code 5 if the drop is larger",
    )
    accuracy(
        "--tol",
        metavar="X",
        help="largest accepted relative difference from the float model; default depends on the precision",
    )

    graph = parser.add_argument_group("graph").add_argument
    graph(
        "--scan",
        default="auto",
        metavar="S",
        help="auto (default), plugin (native kernel), aot (kernel compiled into the TensorRT engine), portable "
        "(standard operators only), or unrolled (ONNX: standard operators without loops, of static shapes)",
    )
    graph("--opset", metavar="N", help="ONNX opset, 18 to 23, default 20")

    detector = parser.add_argument_group(
        "detectors", "Values saved with the weights replace the defaults."
    ).add_argument
    detector(
        "--nms",
        metavar="WHERE",
        help="non-maximum suppression: graph (in the artifact, the default where the target can) or none (the artifact "
        "gives candidates, and evm-run suppresses)",
    )
    detector("--score-thr", metavar="X", help="detections have a larger score, default 0.05")
    detector(
        "--iou", metavar="X", help="overlap over which the worse of two boxes of a class is suppressed, default 0.5"
    )
    detector("--max-det", metavar="N", help="most detections of an image, default 100")

    preprocessing = parser.add_argument_group(
        "preprocessing", "Values saved with the weights replace the defaults."
    ).add_argument
    preprocessing(
        "--mean",
        metavar="R,G,B",
        help="mean of each channel, scaled to 0..1: one number for each channel of the network; default ImageNet's",
    )
    preprocessing("--std", metavar="R,G,B", help="standard deviation of each channel, scaled to 0..1; likewise")
    preprocessing(
        "--resize",
        metavar="R",
        help="crop (default): cover the size, crop the centre; stretch: straight to the size, aspect ratio not kept; "
        "pad: fit into the size, fill right and bottom with the mean, as mmdet and mmseg do",
    )
    preprocessing(
        "--crop-pct",
        metavar="X",
        help="with --resize crop: share of the resized image kept by the centre crop, default 0.875",
    )
    preprocessing(
        "--interpolation",
        metavar="I",
        help="bicubic (default), bilinear, or bilinear-opencv (without antialiasing, as mmdet and mmseg resize)",
    )

    group = parser.add_argument_group("device and engine")
    device = group.add_argument
    device(
        "--device",
        metavar="PROFILE",
        help="device profile (evm-doctor lists them) or FILE.toml: chooses target, precision and native library",
    )
    device(
        "--platform",
        metavar="P",
        help=f"platform of the native library in the bundle: {', '.join(PLATFORMS)}",
    )
    add_flags(group, target_settings.KINDS)
    device("--finish", metavar="BUNDLE", help="build the missing engine of this bundle, on this machine")
    for flag, what in FINISH_ONLY.items():
        device(f"--{flag}", metavar="PUB" if flag == "require-signature" else "FILE", help=f"with --finish: {what}")

    group = parser.add_argument_group("output")
    output = group.add_argument
    output("-o", "--out", default="dist", metavar="DIR", help="folder for the bundles, default dist")
    output(
        "--layout",
        metavar="NAME[:DIR]",
        help="arrange the bundle for a server: triton makes it a model of Triton Inference Server, whose model "
        "repository is DIR on the server (default /models)",
    )
    output("--force", action="store_true", help="replace an existing bundle")
    output("--sign", metavar="KEY", help="sign the bundle with this ed25519 private key (a PEM file)")
    output("--zip", action="store_true", help="also write <bundle>.zip, which evm-run and load open")
    output("--dry-run", action="store_true", help="run all checks, print what would be exported, write nothing")
    common_flags(group)
    output("--config", metavar="FILE", help="TOML file with flags as keys; the command line overrides the file")
    return parser
