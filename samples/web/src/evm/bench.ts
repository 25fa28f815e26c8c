/** Measurement of latency: warm-up runs, then timed runs. */

/** Latency in milliseconds. Percentiles are interpolated between the nearest samples. */
export interface Latency {
  readonly runs: number;
  readonly mean: number;
  readonly min: number;
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
}

/** Call `run` `warmUp` times, then measure `runs` calls. */
export async function latency(
  run: () => Promise<unknown>,
  { warmUp, runs }: { warmUp: number; runs: number },
): Promise<Latency> {
  for (let i = 0; i < warmUp; i++) await run();
  const samples = new Float64Array(runs);
  for (let i = 0; i < runs; i++) {
    const start = performance.now();
    await run();
    samples[i] = performance.now() - start;
  }
  samples.sort();
  const mean = samples.reduce((a, b) => a + b, 0) / runs;
  const [p50, p90, p99] = [0.5, 0.9, 0.99].map((q) => percentile(samples, q)) as [number, number, number];
  return { runs, mean, min: samples[0]!, p50, p90, p99 };
}

function percentile(sorted: Float64Array, q: number): number {
  const place = q * (sorted.length - 1);
  const [below, above] = [sorted[Math.floor(place)]!, sorted[Math.ceil(place)]!];
  return below + (above - below) * (place - Math.floor(place));
}
