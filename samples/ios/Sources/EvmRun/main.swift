// evm-run-coreml BUNDLE [image]: run the self-test, then print the most probable classes of an image.
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
        for found in try model.classify(model.pixels(image)) {
            print(String(format: "%.3f ", found.score), found.label)
        }
    }
    exit(checks.allSatisfy(\.ok) ? 0 : 4)
} catch {
    FileHandle.standardError.write(Data("evm-run-coreml: \(error)\n".utf8))
    exit(2)
}
