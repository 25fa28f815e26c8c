// evm-run-coreml BUNDLE [image]: run the self-test, then print the most probable classes of an image, its detections, or the
// shares of the classes of its label map.
// NOT COMPILED BY THIS PROJECT.
import EvmBundle
import Foundation

let arguments = CommandLine.arguments
guard arguments.count > 1 else {
    print("usage: evm-run-coreml BUNDLE [image]")
    exit(2)
}
do {
    let model = try Model(folder: URL(fileURLWithPath: arguments[1]))
    let checks = try model.selfTest()
    for check in checks {
        let verdict = check.ok ? "ok" : "FAILED"
        print(check.name, String(format: "%.1e  limit %.1e  ", check.error, check.limit) + verdict)
    }
    print(checks.allSatisfy(\.ok) ? "PASSED" : "FAILED")
    if arguments.count > 2 {
        let image = try RgbImage(contentsOf: URL(fileURLWithPath: arguments[2]))
        switch model.manifest.plan.head {
        case "detections":
            for found in try model.detect(image) {
                let box = [found.box.x1, found.box.y1, found.box.x2, found.box.y2].map { String(format: "%.1f", $0) }
                print(String(format: "%.3f ", found.score), found.label, box.joined(separator: " "))
            }
        case "label_map":
            let classes = try model.segment(image).classes
            let counts = Dictionary(classes.map { ($0, 1) }, uniquingKeysWith: +).sorted { $0.value > $1.value }
            for (index, count) in counts {
                print(String(format: "%.3f ", Double(count) / Double(classes.count)), "class \(index)")
            }
        default:
            for found in try model.classify(model.pixels(image)) {
                print(String(format: "%.3f ", found.score), found.label)
            }
        }
    }
    exit(checks.allSatisfy(\.ok) ? 0 : 4)
} catch {
    FileHandle.standardError.write(Data("evm-run-coreml: \(error)\n".utf8))
    exit(2)
}
