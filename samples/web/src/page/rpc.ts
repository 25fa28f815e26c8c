/** Calls from the page to its worker. A call sends a method's name and arguments; the answer is a value or an error. */

import { EvmError } from "../evm";

type Functions = Record<string, (...args: never[]) => unknown>;
interface Call {
  readonly id: number;
  readonly method: string;
  readonly args: unknown[];
}
type Answer = { readonly id: number } & ({ readonly value: unknown } | { readonly error: { message: string; hint: string } });

/** Answer calls of `functions` in the worker, one after another. */
export function serve(functions: Functions): void {
  let last = Promise.resolve();
  addEventListener("message", ({ data }: MessageEvent<Call>) => {
    last = last.then(async () => postMessage(await answered(functions, data)));
  });
}

async function answered(functions: Functions, { id, method, args }: Call): Promise<Answer> {
  try {
    return { id, value: await functions[method]!(...(args as never[])) };
  } catch (error) {
    const { message, hint = "" } = error as Error & { hint?: string };
    if (!(error instanceof EvmError)) console.error(error); // an unexpected error: a bug in the page or the library
    return { id, error: { message, hint } };
  }
}

/** The page's side of a worker whose functions are F. */
export class Remote<F extends Functions> {
  private readonly waiting = new Map<number, PromiseWithResolvers<unknown>>();
  private calls = 0;

  constructor(private readonly worker: Worker) {
    worker.addEventListener("message", ({ data }: MessageEvent<Answer>) => {
      const { resolve, reject } = this.waiting.get(data.id)!;
      this.waiting.delete(data.id);
      if ("error" in data) reject(new EvmError(data.error.message, data.error.hint));
      else resolve(data.value);
    });
    worker.addEventListener("error", (event) => {
      for (const { reject } of this.waiting.values()) reject(new EvmError(`the worker stopped: ${event.message}`, "reload the page"));
      this.waiting.clear();
    });
  }

  /** Call a function of the worker. `moved`: arguments that are transferred, not copied. Rejects with EvmError. */
  call<M extends keyof F & string>(
    method: M,
    args: Parameters<F[M]>,
    moved: Transferable[] = [],
  ): Promise<Awaited<ReturnType<F[M]>>> {
    const pending = Promise.withResolvers<unknown>();
    const id = this.calls++;
    this.waiting.set(id, pending);
    this.worker.postMessage({ id, method, args } satisfies Call, moved);
    return pending.promise as Promise<Awaited<ReturnType<F[M]>>>;
  }
}
