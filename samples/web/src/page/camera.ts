/** Access to the camera, frame by frame. */

import { at } from "./dom";

const video = at<HTMLVideoElement>("video");
let stream: MediaStream | null = null;

/** Test whether the camera is on. */
export function running(): boolean {
  return stream !== null;
}

/** Start the camera and call `frame` with one image after another until the camera is stopped. */
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

/** Stop the camera. */
export function stop(): void {
  stream?.getTracks().forEach((track) => track.stop());
  video.srcObject = stream = null;
}
