/** Offline use: a service worker keeps the page, the runtime and the built-in bundle. */

import { at } from "./dom";

/** Register the service worker and show whether the page is available offline. */
export async function keepOffline(): Promise<void> {
  const line = at("offline");
  if (import.meta.env.DEV) return;
  if (!("serviceWorker" in navigator)) {
    line.textContent = "Not available offline: the browser allows no service workers here (they need https)";
    return;
  }
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    line.textContent = "Available offline";
  } catch (error) {
    line.textContent = `Not available offline: ${error instanceof Error ? error.message : error}`;
  }
}
