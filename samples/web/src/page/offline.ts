/** Keeps the page, the runtime and the built-in bundle for when there is no network. */

import { at } from "./dom";

export async function keepOffline(): Promise<void> {
  const line = at("offline");
  if (import.meta.env.DEV) return;
  if (!("serviceWorker" in navigator)) {
    line.textContent = "Not kept for offline use: the browser has no service workers here (they need https)";
    return;
  }
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    line.textContent = "Kept for offline use";
  } catch (error) {
    line.textContent = `Not kept for offline use: ${error instanceof Error ? error.message : error}`;
  }
}
