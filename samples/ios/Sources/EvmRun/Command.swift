// The command: run the self-test of a bundle, then print the most probable classes of an image, its detections, or the shares
// of the classes of its label map.
import EvmBundle
import Foundation

/// Runs the command with the arguments BUNDLE [image] and `print`s lines. `open` opens artifacts, `decode` reads image files.
/// Returns the exit code: 0 if the self-test passed, 4 if it failed, 2 if anything else is wrong.
func command(
    _ arguments: [String], open: @escaping Open, decode: (URL) throws -> RgbImage, print: (String) -> Void = { print($0) }
) -> Int32 {
    guard (1...2).contains(arguments.count) else {
        print("usage: evm-run-coreml BUNDLE [image]")
        return 2
    }
    do {
        let model = try Model(folder: URL(fileURLWithPath: arguments[0]), open: open)
        let checks = try model.selfTest(decode: decode)
        for check in checks {
            let verdict = check.ok ? "ok" : "FAILED"
            print(check.name + String(format: " %.1e  limit %.1e  ", check.error, check.limit) + verdict)
        }
        print(checks.allSatisfy(\.ok) ? "PASSED" : "FAILED")
        if arguments.count > 1 {
            try predictions(model, decode(URL(fileURLWithPath: arguments[1]))).forEach(print)
        }
        return checks.allSatisfy(\.ok) ? 0 : 4
    } catch {
        FileHandle.standardError.write(Data("evm-run-coreml: \(error)\n".utf8))
        return 2
    }
}

private func predictions(_ model: Model, _ image: RgbImage) throws -> [String] {
    switch model.manifest.plan.head {
    case "detections":
        return try model.detect(image).map { found in
            let box = [found.box.x1, found.box.y1, found.box.x2, found.box.y2].map { String(format: "%.1f", $0) }
            return String(format: "%.3f  ", found.score) + "\(found.label) \(box.joined(separator: " "))"
        }
    case "label_map":
        let classes = try model.segment(image).classes
        let counts = Dictionary(classes.map { ($0, 1) }, uniquingKeysWith: +).sorted { $0.value > $1.value }
        return counts.map { String(format: "%.3f  ", Double($1) / Double(classes.count)) + "class \($0)" }
    default:
        return try model.classify(model.pixels(image)).map { String(format: "%.3f  ", $0.score) + $0.label }
    }
}
