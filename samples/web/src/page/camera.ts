/** The camera, from when it is asked for until it is stopped: one frame after the other. */

import { at } from "./dom";

const video = at<HTMLVideoElement>("video");
let stream: MediaStream | null = null;

export function running(): boolean {
  return stream !== null;
}

/** Starts the camera; `frame` is called for as long as it runs, each time when the last call is done. */
export async function start(started: () => void, frame: (image: ImageBitmap) => Promise<void>): Promise<void> {
  const mine = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  stream = mine;
  video.srcObject = mine;
  await video.play();
  started();
  while (stream === mine) {
    await new Promise(requestAnimationFrame);
    if (stream !== mine) return;
    await frame(await createImageBitmap(video, { premultiplyAlpha: "none", colorSpaceConversion: "none" }));
  }
}

export function stop(): void {
  stream?.getTracks().forEach((track) => track.stop());
  video.srcObject = stream = null;
}
