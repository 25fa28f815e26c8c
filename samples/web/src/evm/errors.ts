/** Expected failures: what is wrong, where, and what to do next. Codes and places are those of Python (docs/bundle.md). */

/** `code`: the kind of failure; `where`: the key path in the manifest, or the file in the bundle, that is wrong. */
export interface Fault extends ErrorOptions {
  readonly code?: string;
  readonly where?: string;
}

export class EvmError extends Error {
  readonly code: string;
  readonly where: string;

  /** `hint`: the next thing to do, shown on its own line; empty where there is none. */
  constructor(
    message: string,
    readonly hint = "",
    { code = "", where = "", ...options }: Fault = {},
  ) {
    super(message, options);
    this.name = new.target.name;
    [this.code, this.where] = [code, where];
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
