/** Display of results: bars, tables, facts about the bundle, and errors. */

import { EvmError, type Check, type Latency, type PreprocessingFacts } from "../evm";
import { at, make } from "./dom";
import type { Classified, Opened } from "./worker";

const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" } as const;

/** Show the classes of an image and the times. */
export function showTop({ top, milliseconds }: Classified): void {
  headline(top[0]!.label, percent(top[0]!.score));
  at("bars").replaceChildren(
    ...top.map(({ label, score }) => {
      const bar = make("i", {});
      bar.style.width = `${100 * score}%`;
      const parts = [make("span", { class: "label", title: label }, label), make("span", { class: "score" }, percent(score))];
      return make("li", {}, ...parts, make("span", { class: "track", "aria-hidden": "true" }, bar));
    }),
  );
  at("inference").textContent = ms(milliseconds.inference);
  at("preprocessing").textContent = ms(milliseconds.preprocessing);
  at("timing").hidden = false;
}

/** Show a text in place of the classes. */
export function showNoTop(text: string): void {
  headline("", text);
  at("bars").replaceChildren();
  at("timing").hidden = true;
}

/** Describe the resize: `crop 0.875`, `stretch` or `pad`. */
function resizeText({ resize = "crop", crop_pct = 1 }: PreprocessingFacts): string {
  return resize === "crop" ? `crop ${crop_pct}` : resize;
}

/** Show facts about the opened bundle. */
export function showBundle(opened: Opened): void {
  const { name, precision, input, classes, bytes, preprocessing, provider, threads, loadMs } = opened;
  const where = NAMES[provider.value] + (provider.value === "wasm" ? `, ${count(threads, "thread")}` : "");
  at("conditions").textContent = `${where}: ${provider.reason}`;
  const rows: [string, string][] = [
    ["Name", name],
    ["Model", `${precision}, ${(bytes / 1e6).toFixed(1)} MB, ${classes ? count(classes, "class", "es") : "feature maps"}`],
    ["Reads", `${preprocessing.size.join("x")}, ${input}, ${preprocessing.interpolation}, ${resizeText(preprocessing)}`],
    ["Loaded in", ms(loadMs)],
  ];
  at("facts").replaceChildren(...rows.map(([term, fact]) => make("div", {}, make("dt", {}, term), make("dd", {}, fact))));
  at("checks").replaceChildren();
  at("latency").replaceChildren();
}

/** Show the checks of the self-test. */
export function showChecks(checks: readonly Check[]): void {
  const passed = checks.every((check) => check.ok);
  const rows = checks.map(({ name, error, limit, ok }) => [ok ? "" : "bad", name, exponent(error), exponent(limit)] as const);
  at("checks").replaceChildren(table(passed ? "PASSED" : "FAILED", passed ? "good" : "bad", ["", "error", "limit"], rows));
}

/** Show the result of the benchmark. */
export function showLatency({ runs, p50, p90, p99, min }: Latency): void {
  const rows = [["p50", p50], ["p90", p90], ["p99", p99], ["fastest", min]] as const;
  const cells = rows.map(([name, value]) => ["", name, ms(value)] as const);
  at("latency").replaceChildren(table(`${ms(p50)}, the median of ${runs}`, "", ["", "latency"], cells));
}

/** Show an error and its hint. If `useWasm` is given, show the button that calls it. */
export function showProblem(error: unknown, useWasm?: () => void): void {
  if (!(error instanceof EvmError)) console.error(error);
  at("message").textContent = error instanceof Error ? error.message : String(error);
  at("hint").textContent = error instanceof EvmError ? error.hint : "";
  const button = at<HTMLButtonElement>("use-wasm");
  button.hidden = !useWasm;
  button.onclick = useWasm ?? null;
  at("problem").hidden = false;
}

/** Hide the error. */
export function showNoProblem(): void {
  at("problem").hidden = true;
}

function headline(text: string, soft: string): void {
  at("headline").replaceChildren(text, " ", make("small", {}, soft));
}

function table(
  caption: string,
  kind: string,
  head: readonly string[],
  rows: readonly (readonly [kind: string, name: string, ...cells: string[]])[],
): HTMLTableElement {
  const columns = head.map((text) => make("th", { scope: "col" }, text));
  const body = rows.map(([kind, name, ...cells]) =>
    make("tr", { class: kind }, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))),
  );
  return make(
    "table", {},
    make("caption", { class: kind }, caption), make("thead", {}, make("tr", {}, ...columns)), make("tbody", {}, ...body),
  );
}

function percent(score: number): string {
  return `${(100 * score).toFixed(1)} %`;
}

function ms(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

function exponent(value: number): string {
  return Number.isFinite(value) ? value.toExponential(1) : "not finite";
}

function count(n: number, one: string, plural = "s"): string {
  return `${n} ${one}${n === 1 ? "" : plural}`;
}
