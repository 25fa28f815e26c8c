/** Expected failures, worded as evm-deploy's Python words them: what is wrong, where, and what to do next. */

export class EvmError extends Error {
  /** `hint`: the next thing to do, shown on its own line; empty where there is none. */
  constructor(
    message: string,
    readonly hint = "",
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** A value or combination that cannot work. */
export class UsageError extends EvmError {}

/** An image that cannot be read. */
export class ImageError extends EvmError {}

/** A bundle that is missing, damaged, or not for this runtime. */
export class BundleError extends EvmError {}

/** Something that the browser or the server lacks. */
export class ToolchainError extends EvmError {}

/** The first line of what a parser or a runtime threw. */
export function reason(error: unknown): string {
  return String(error instanceof Error ? error.message : error).trim().split("\n")[0] ?? "";
}
