// State of the screen, and the actor that runs the model in the background.
// NOT COMPILED BY THIS PROJECT.
import Combine
import CoreGraphics
import EvmBundle
import Foundation

@MainActor
final class Session: ObservableObject {
    @Published private(set) var status = ""
    @Published private(set) var seen: CGImage?
    @Published private(set) var predictions: [Prediction] = []
    @Published private(set) var checks: [Check] = []
    @Published private(set) var isBusy = false
    private let worker: Worker

    init(bundle: URL?) { worker = Worker(bundle: bundle) }

    /// Classifies the image file that `load` returns. `name` names the image in errors.
    func classify(named name: String, _ load: @escaping @Sendable () async throws -> Data?) {
        work("classifying") { worker in
            guard let data = try await load() else { throw EvmError(.image, "image \(name) does not exist") }
            let found = try await worker.classify(data, name: name)
            self.seen = found.seen.cgImage
            self.predictions = found.predictions
            let (before, during) = (found.preprocessingMs, found.inferenceMs)
            self.status = String(format: "preprocessing %.1f ms   inference %.1f ms", before, during)
        }
    }

    func selfTest() {
        work("running the self-test") { worker in
            self.checks = try await worker.selfTest()
            self.status = self.checks.allSatisfy(\.ok) ? "PASSED" : "FAILED"
        }
    }

    private func work(_ doing: String, _ task: @escaping @MainActor (Worker) async throws -> Void) {
        (isBusy, status, predictions, checks) = (true, doing, [], [])
        Task {
            do { try await task(worker) } catch { status = "\(error)" }
            isBusy = false
        }
    }
}

/// Result of a classification: `seen`, the pixels that the model read, the classes, and the times in milliseconds.
struct Found: Sendable {
    let seen: RgbImage
    let predictions: [Prediction]
    let preprocessingMs: Double
    let inferenceMs: Double
}

/// Actor that owns the model. It runs one call at a time, and never on the main thread.
actor Worker {
    private let bundle: URL?
    private var opened: Model?

    init(bundle: URL?) { self.bundle = bundle }

    func classify(_ data: Data, name: String) throws -> Found {
        let model = try self.model()
        let image = try RgbImage(data: data, name: name)
        let start = DispatchTime.now()
        let pixels = try model.pixels(image, name: name)
        let ready = DispatchTime.now()
        let predictions = try model.classify(pixels)
        let end = DispatchTime.now()
        return Found(
            seen: pixels, predictions: predictions, preprocessingMs: milliseconds(start, ready),
            inferenceMs: milliseconds(ready, end))
    }

    func selfTest() throws -> [Check] { try model().selfTest() }

    private func model() throws -> Model {
        if let opened { return opened }
        guard let bundle else {
            throw EvmError(.bundle, "this app has no bundle", hint: "add its folder to the app's resources")
        }
        let model = try Model(folder: bundle)
        opened = model
        return model
    }
}

private func milliseconds(_ start: DispatchTime, _ end: DispatchTime) -> Double {
    Double(end.uptimeNanoseconds - start.uptimeNanoseconds) / 1e6
}
