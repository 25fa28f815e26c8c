/** Float64 reference of the selective scan, for the self-test. */

import type { Tensor, Tensors } from "./tensor";

/** Largest error of the SSM part: ten times that of correct lowerings. */
const TOLERANCE = 2e-5;
const EPSILON = 2 ** -23;
const TINY = 2 ** -126;

/**
 * Compare the SSM part of y, y - skip * u, with the float64 reference. error: relative to the largest value of the SSM
 * part; infinite if y has NaN or Inf. limit: includes the rounding of y in float32, which dominates where skip * u is much
 * larger than the SSM part.
 */
export function ssmError(y: Tensor, scan: Tensors): { error: number; limit: number } {
  const { want, skipPart } = selectiveScan(scan);
  let [largest, largestSkip, off] = [TINY, 0, y.data.length === want.length ? 0 : Infinity];
  for (let i = 0; i < want.length; i++) {
    largest = Math.max(largest, Math.abs(want[i]! - skipPart[i]!));
    largestSkip = Math.max(largestSkip, Math.abs(skipPart[i]!));
    off = Number.isFinite(y.data[i]) ? Math.max(off, Math.abs(y.data[i]! - want[i]!)) : Infinity;
  }
  return { error: off / largest, limit: TOLERANCE + (4 * EPSILON * largestSkip) / largest };
}

/**
 * Compute the selective scan in float64, one step at a time. u, delta (b, K, L, D); A (K, D, N), negative; B, C (b, K, L,
 * N); skip, bias (K, D). `delta` is the value before softplus. want: y with the shape of u; skipPart: skip * u.
 */
function selectiveScan(scan: Tensors): { want: Float64Array; skipPart: Float64Array } {
  const of = (name: string): Tensor["data"] => scan[name]!.data;
  const [u, delta, A, B, C, skip, bias] = [of("u"), of("delta"), of("A"), of("B"), of("C"), of("skip"), of("bias")];
  const [b, K, L, D] = scan["u"]!.shape as [number, number, number, number];
  const N = scan["A"]!.shape[2]!;
  const [want, skipPart] = [new Float64Array(b * K * L * D), new Float64Array(b * K * L * D)];
  for (let bk = 0; bk < b * K; bk++)
    for (let d = 0; d < D; d++) {
      const channel = (bk % K) * D + d;
      const state = new Float64Array(N);
      for (let l = 0; l < L; l++) {
        const at = (bk * L + l) * D + d;
        const dt = softplus(delta[at]! + bias[channel]!);
        skipPart[at] = skip[channel]! * u[at]!;
        let y = skipPart[at]!;
        for (let n = 0; n < N; n++) {
          const input = (bk * L + l) * N + n;
          state[n] = Math.exp(dt * A[channel * N + n]!) * state[n]! + dt * u[at]! * B[input]!;
          y += C[input]! * state[n]!;
        }
        want[at] = y;
      }
    }
  return { want, skipPart };
}

function softplus(x: number): number {
  return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
}
