/** The service worker. After the first visit the page, the runtime and the built-in bundle are available without a network. */

export {};
declare const self: ServiceWorkerGlobalScope;
/** Inserted by the build (vite.config.ts). */
declare const __PRECACHE__: { version: string; files: string[] };

const { version, files } = __PRECACHE__;
const PREFIX = "evm-";
const CACHE = PREFIX + version;

self.addEventListener("install", (event) => event.waitUntil(fill()));
self.addEventListener("activate", (event) => event.waitUntil(takeOver()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === self.location.origin) event.respondWith(answer(event.request));
});

/** Fill the cache. Names in assets/ change with their content, so the browser's cached copies of them are valid. */
async function fill(): Promise<void> {
  const cache = await caches.open(CACHE);
  const fresh = (file: string): RequestCache => (file.startsWith("assets/") ? "default" : "no-cache");
  await cache.addAll(files.map((file) => new Request(file, { cache: fresh(file) })));
}

/** Delete the caches of older versions. Runs when no page uses the previous version any more. */
async function takeOver(): Promise<void> {
  const old = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function answer(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const wanted = request.mode === "navigate" && request.url.split(/[?#]/)[0]!.endsWith("/") ? "index.html" : request;
  const kept = await cache.match(wanted, { ignoreSearch: true, ignoreVary: true }); // servers vary by Origin
  if (kept) return kept;
  const response = await fetch(request);
  if (response.ok && request.url.includes("/assets/")) await cache.put(request, response.clone());
  return response;
}
