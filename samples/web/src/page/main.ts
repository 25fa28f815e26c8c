/** Main script of the page: handles the user's actions, calls the worker, and shows the results. */

import { EvmError, type ModelOptions } from "../evm";
import * as camera from "./camera";
import { at } from "./dom";
import { given, ofFile, ofFolder, type Given } from "./dropped";
import { keepOffline } from "./offline";
import { showAnswer, showBundle, showChecks, showLatency, showNoProblem, showNoTop, showProblem } from "./results";
import { Remote } from "./rpc";
import { showNothing, showImage, showVideo } from "./stage";
import type { Engine, Opened, Place } from "./worker";

const TOP = 5;
const BUILT_IN: Place = { url: new URL("bundle", document.baseURI).href };
const NEEDS_BUNDLE = ["selftest", "bench"];
const NEEDS_PREDICTIONS = ["choose", "camera"];

const engine = new Remote<Engine>(new Worker(new URL("./worker.ts", import.meta.url), { type: "module" }));
let bundle: Opened | null = null;

async function open(place: Place, options = asked()): Promise<void> {
  at("conditions").textContent = "Loading the bundle";
  stopCamera();
  try {
    bundle = await engine.call("open", [place, options]);
    showNoProblem();
    showNothing();
    showNoTop(bundle.predicts ? "No image yet" : "Feature maps, no classes");
  } catch (error) {
    const wasm = (): void => void open(place, { ...options, provider: "wasm" });
    showProblem(error, options.provider === "wasm" ? undefined : wasm);
    if (!bundle) showNoTop("No bundle");
  }
  if (bundle) showBundle(bundle);
  else at("conditions").textContent = "No model is loaded";
  enable();
}

async function predict(image: File): Promise<void> {
  if (!bundle) return;
  stopCamera();
  await busy(async (bundle) => {
    await showImage(image, bundle.preprocessing);
    showAnswer(await engine.call("predict", [image, TOP]), bundle);
  }, noAnswer);
}

async function startCamera(): Promise<void> {
  await busy(async (bundle) => {
    const started = (): void => {
      pressed(true);
      showVideo(bundle.preprocessing);
    };
    await camera.start(started, async (frame) => showAnswer(await engine.call("predict", [frame, TOP], [frame]), bundle));
  }, noAnswer);
  stopCamera();
}

function stopCamera(): void {
  if (!camera.running()) return;
  camera.stop();
  pressed(false);
  showNothing();
}

/** Show the state of the camera button. While the camera is on, screen readers do not announce the class of every frame. */
function pressed(on: boolean): void {
  const button = at("camera");
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "Stop the camera" : "Start the camera";
  at("headline").setAttribute("aria-live", on ? "off" : "polite");
}

function noAnswer(): void {
  showNoTop("No answer");
}

/** Call `act` with the bundle and show errors on the page. */
async function busy(act: (bundle: Opened) => Promise<void>, failed: () => void = () => {}): Promise<void> {
  if (!bundle) return;
  showNoProblem();
  try {
    await act(bundle);
  } catch (error) {
    failed();
    showProblem(error);
  }
}

async function measured(button: string, act: () => Promise<void>): Promise<void> {
  const element = at<HTMLButtonElement>(button);
  element.disabled = true;
  await busy(act);
  element.disabled = false;
}

function enable(): void {
  for (const id of NEEDS_BUNDLE) at<HTMLButtonElement>(id).disabled = !bundle;
  for (const id of NEEDS_PREDICTIONS) at<HTMLButtonElement>(id).disabled = !bundle?.predicts;
}

function take(what: Given | null): void {
  if (!what) showProblem(new EvmError("dropped files are neither an image nor a bundle", "drop one image, or one bundle as a zip or folder"));
  else if ("bundle" in what) void open(what.bundle);
  else void predict(what.image);
}

/** Read the options from the address, such as `?provider=wasm&threads=1&scan=portable`. */
function asked(): ModelOptions {
  const query = new URLSearchParams(location.search);
  const [provider, scan] = ["provider", "scan"].map((key) => query.get(key) ?? "auto"); // Model.open checks the values
  return { provider, scan, ...(query.has("threads") && { threads: Number(query.get("threads")) }) } as ModelOptions;
}

/** Make a button open a file dialogue, and use the chosen files. */
function dialogue(button: string, input: string, taken: (files: FileList) => Given): void {
  const element = at<HTMLInputElement>(input);
  at(button).addEventListener("click", () => element.click());
  element.addEventListener("change", () => {
    if (element.files?.length) take(taken(element.files));
    element.value = ""; // the same file may be chosen again
  });
}

function dropped(): void {
  const over = (on: boolean): unknown => at("stage").classList.toggle("over", on);
  addEventListener("dragover", (event) => (event.preventDefault(), over(true)));
  addEventListener("dragleave", (event) => event.relatedTarget ?? over(false));
  addEventListener("drop", async (event) => {
    event.preventDefault();
    over(false);
    if (event.dataTransfer) take(await given(event.dataTransfer));
  });
  addEventListener("paste", async (event) => {
    if (event.clipboardData?.files.length) take(await given(event.clipboardData));
  });
}

dialogue("choose", "image-input", (files) => ofFile(files[0]!));
dialogue("choose-zip", "zip-input", (files) => ({ bundle: { zip: files[0]! } }));
dialogue("choose-folder", "folder-input", ofFolder);
dropped();
at("camera").addEventListener("click", () => (camera.running() ? stopCamera() : void startCamera()));
at("selftest").addEventListener("click", () => measured("selftest", async () => showChecks(await engine.call("selftest", []))));
at("bench").addEventListener("click", () => measured("bench", async () => showLatency(await engine.call("bench", []))));
void open(BUILT_IN);
void keepOffline();
