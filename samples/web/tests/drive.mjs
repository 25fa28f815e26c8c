/**
 * Test driver that runs the built page in Chromium for tests/test_web.py. It reads one line of JSON for each scenario,
 * {scenario, ...arguments}, and writes one line of JSON with the answer.
 *
 *     node tests/drive.mjs URL
 *
 * Every scenario has its own browser profile. The answer includes the console messages and the requested addresses.
 */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const URL_OF_PAGE = process.argv[2];
const FLAGS = [
  ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
  ...["--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
];

const GPU_FLAGS = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

const scenarios = {
  /** Classify images on the page with its built-in bundle, then run the self-test and the benchmark; return the results. */
  async page(page, { images }) {
    await ready(page);
    const answers = [];
    for (const image of images) answers.push(await classified(page, image));
    const checks = await table(page, "Run the self-test", "#checks");
    const latency = await table(page, "Run the benchmark", "#latency");
    return { answers, checks, latency, conditions: await page.textContent("#conditions") };
  },

  /** Give several bundles to the page, one after another: choose `folder`, drop `zip`; run the self-test of each. */
  async replaced(page, { bundles, image }) {
    await ready(page);
    const seen = [];
    for (const { folder, zip } of bundles) {
      await page.evaluate(() => document.getElementById("facts").replaceChildren());
      if (folder) await page.setInputFiles("#folder-input", folder);
      else await drop(page, zip);
      await page.waitForFunction(() => document.querySelector("#facts dd, #problem:not([hidden])"));
      const problem = (await page.isVisible("#problem")) ? await page.innerText("#problem") : null;
      const answer = (await page.isEnabled("#choose")) ? await classified(page, image) : null;
      const checks = await table(page, "Run the self-test", "#checks");
      seen.push({ problem, answer, checks, facts: await page.innerText("#facts"), headline: await page.innerText("h2") });
    }
    return { seen };
  },

  /** Give bundles of detectors and segmenters to the page; predict of an image; return what is shown and drawn. */
  async drawn(page, { bundles, image, shots = [] }) {
    await ready(page);
    const seen = [];
    for (const [i, folder] of bundles.entries()) {
      await page.evaluate(() => document.getElementById("facts").replaceChildren());
      await page.setInputFiles("#folder-input", folder);
      await page.waitForSelector("#facts dd");
      const answer = await classified(page, image);
      const painted = await page.evaluate(() => {
        const overlay = document.getElementById("overlay");
        const copy = new OffscreenCanvas(overlay.width, overlay.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(overlay, 0, 0);
        const { data } = copy.getImageData(0, 0, overlay.width, overlay.height);
        const alphas = data.filter((_, i) => i % 4 === 3);
        return { drawn: alphas.filter((alpha) => alpha > 0).length / alphas.length, alpha: alphas[0], corner: [...data.slice(0, 3)] };
      });
      if (shots[i]) await page.screenshot({ path: shots[i] });
      seen.push({ ...answer, ...painted, facts: await page.innerText("#facts") });
    }
    return { seen };
  },

  /** Give files that are not images to the page and return its messages; then classify a good image. */
  async problems(page, { images, good }) {
    await ready(page);
    const said = [];
    for (const image of images) {
      await page.setInputFiles("#image-input", image);
      await page.waitForSelector("#problem:not([hidden])");
      said.push(await page.innerText("#problem"));
      await page.evaluate(() => (document.getElementById("problem").hidden = true));
    }
    return { said, answer: await classified(page, good), problem: await page.isVisible("#problem") };
  },

  /** Load the page once, switch the network off, reload, classify an image and run the self-test. */
  async offline(page, { image }) {
    await ready(page);
    await page.waitForFunction(() => document.getElementById("offline").textContent === "Available offline");
    await page.context().setOffline(true);
    const gone = await page.evaluate(() => fetch("not-kept").then(() => false, () => true));
    await page.reload();
    await enabled(page);
    const answer = await classified(page, image);
    const checks = await table(page, "Run the self-test", "#checks");
    return { gone, answer, checks, caches: await page.evaluate(() => caches.keys()) };
  },

  /** Start the camera (Chromium's test image), read the result, stop the camera, all by keyboard. */
  async camera(page) {
    await ready(page);
    const asked = await page.evaluate(() => document.getElementById("video").srcObject !== null);
    await page.focus("#camera");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#video:visible");
    await page.waitForSelector("#bars li");
    const [first, later] = [await page.textContent("#inference"), await changed(page, "#inference")];
    const track = await page.evaluateHandle(() => document.getElementById("video").srcObject.getTracks()[0]);
    await page.keyboard.press("Space");
    await page.waitForSelector("#prompt:visible");
    return { asked, first, later, state: await track.evaluate((each) => each.readyState), pressed: await page.getAttribute("#camera", "aria-pressed") };
  },

  /** Test the page's content security policy, and that the page has the names that a screen reader needs. */
  async policy(page) {
    await ready(page);
    return page.evaluate(async () => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
      const away = await fetch("https://example.invalid/").then(() => "", (error) => String(error));
      const nameless = [...document.querySelectorAll("button, input:not([hidden]), canvas, video")].filter(
        (element) => !(element.textContent || element.ariaLabel),
      );
      return { ran: "ran" in window, away, nameless: nameless.map((element) => element.outerHTML), isolated: crossOriginIsolated };
    });
  },

  /** Take a screenshot of the page after a classification and a self-test. */
  async screenshot(page, { image, file, scheme, width, height }) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height });
    await ready(page);
    await classified(page, image);
    await table(page, "Run the self-test", "#checks");
    await table(page, "Run the benchmark", "#latency");
    await page.evaluate(() => (document.activeElement.blur(), scrollTo(0, 0)));
    await page.mouse.move(0, 0);
    await page.screenshot({ path: file });
    return page.evaluate(() => ({ scroll: document.documentElement.scrollWidth, width: innerWidth }));
  },

  /** Open the page with a query; return the provider and the facts that it shows, or its error. */
  async asked(page, { query }) {
    await page.goto(URL_OF_PAGE + query);
    await page.waitForFunction(() => document.querySelector("#facts dd, #problem:not([hidden])"));
    const problem = await page.innerText("#problem");
    if (await page.isVisible("#use-wasm")) {
      await page.click("#use-wasm");
      await enabled(page);
    }
    return { problem, conditions: await page.textContent("#conditions"), facts: await page.innerText("#facts") };
  },

  /** Run WebGPU on a software adapter; also return the provider that the page chooses if there is no other adapter. */
  async gpu(page, { images }) {
    await page.goto(URL_OF_PAGE + "?provider=webgpu");
    await enabled(page);
    const conditions = await page.textContent("#conditions");
    const answers = [];
    for (const image of images) answers.push(await classified(page, image));
    const checks = await table(page, "Run the self-test", "#checks");
    await ready(page);
    return { conditions, answers, checks, "by itself": await page.textContent("#conditions") };
  },

  /** Run the example of docs/embed/web.md and return its output. */
  async example(page, { image }) {
    await page.goto(URL_OF_PAGE + "example.html");
    await page.setInputFiles("input", image);
    await page.waitForFunction(() => document.querySelector("output").textContent);
    return { output: await page.textContent("output") };
  },

  /** Run `code` with the library, without the page: the body of an async function of `evm`, `file(path)` and `given`. */
  async library(page, { code, given, files }) {
    const fulfill = (route) => {
      const path = decodeURIComponent(new URL(route.request().url()).pathname.split("/files/")[1]);
      return route.fulfill({ path: join(files, path) }).catch(() => route.fulfill({ status: 404 }));
    };
    await page.route("**/files/**", fulfill);
    if (page.url() === "about:blank") await page.goto(URL_OF_PAGE + "library.html");
    await page.waitForFunction(() => "evm" in window);
    const file = `(path) => fetch("files/" + path).then((response) => response.blob())`;
    const value = await page.evaluate(`(async (evm, file, given) => { ${code} })(window.evm, ${file}, ${JSON.stringify(given)})`);
    await page.unroute("**/files/**", fulfill);
    return { value };
  },
};

async function ready(page) {
  await page.goto(URL_OF_PAGE);
  await enabled(page);
}

async function enabled(page) {
  await page.waitForSelector("#selftest:enabled");
}

/** Choose an image in the file dialogue and return the headline and the rows below it. */
async function classified(page, image) {
  await page.evaluate(() => document.getElementById("bars").replaceChildren());
  await page.setInputFiles("#image-input", image);
  await page.waitForSelector("#bars li");
  const rows = await page.locator("#bars li").evaluateAll((items) => items.map((item) => item.innerText.split("\n")));
  return { headline: await page.innerText("#headline"), rows, inference: await page.textContent("#inference") };
}

/** Press a button that fills a table and return the caption and the rows of the table. */
async function table(page, button, place) {
  await page.getByRole("button", { name: button }).click();
  await page.waitForSelector(`${place} table`);
  const rows = await page.locator(`${place} tbody tr`).evaluateAll((rows) => rows.map((row) => row.innerText.split("\t")));
  return { caption: await page.textContent(`${place} caption`), rows };
}

async function drop(page, path) {
  const content = readFileSync(path).toString("base64");
  const data = await page.evaluateHandle(
    async ([content, name]) => {
      const bytes = await (await new Response(Uint8Array.from(atob(content), (c) => c.charCodeAt(0)))).arrayBuffer();
      const data = new DataTransfer();
      data.items.add(new File([bytes], name));
      return data;
    },
    [content, path.split("/").at(-1)],
  );
  await page.dispatchEvent("#stage", "drop", { dataTransfer: data });
}

async function changed(page, place) {
  const before = await page.textContent(place);
  await page.waitForFunction(([place, before]) => document.querySelector(place).textContent !== before, [place, before]);
  return page.textContent(place);
}

const launch = (flags) => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
const browser = await launch(FLAGS);
let library; // the page of scenario `library` stays open

/** Open a new page for a scenario; return it with its console messages and requested addresses so far. */
async function opened(scenario) {
  const serviceWorkers = ["offline", "screenshot"].includes(scenario) ? "allow" : "block"; // each fetches 14 MB
  const own = scenario === "gpu" ? await launch([...GPU_FLAGS, ...FLAGS.filter((flag) => flag !== "--disable-gpu")]) : null;
  const context = await (own ?? browser).newContext({ permissions: ["camera"], serviceWorkers });
  context.on("close", () => own?.close());
  context.setDefaultTimeout(own ? 120_000 : 60_000); // the machine may be busy, and software WebGPU is slow
  const [said, addresses] = [[], []];
  context.on("console", (message) => {
    if (!message.text().includes("blocked by Playwright")) said.push(`${message.type()}: ${message.text()}`);
  });
  context.on("weberror", (error) => said.push(`uncaught: ${error.error()}`));
  context.on("request", (request) => addresses.push(request.url()));
  return { page: await context.newPage(), said, addresses };
}

for await (const line of createInterface({ input: process.stdin })) {
  const { scenario, ...given } = JSON.parse(line);
  const { page, said, addresses } = scenario === "library" ? (library ??= await opened(scenario)) : await opened(scenario);
  const answer = await scenarios[scenario](page, given).catch((error) => ({ failed: String(error) }));
  console.log(JSON.stringify({ ...answer, console: said.splice(0), addresses: addresses.splice(0) }));
  if (scenario !== "library") await page.context().close();
}
await browser.close();
