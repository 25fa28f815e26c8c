/** Expected errors. Codes and places are the same as in Python (docs/bundle.md). */

/** `code`: the code of the error; `where`: the key path in the manifest, or the file in the bundle, that is wrong. */
export interface Fault extends ErrorOptions {
  readonly code?: string;
  readonly where?: string;
}

/** Base class of all expected errors. */
export class EvmError extends Error {
  readonly code: string;
  readonly where: string;

  /** `hint`: the next step for the user, shown on its own line; may be empty. */
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

/** An invalid value or combination of values. */
export class UsageError extends EvmError {}

/** An image that cannot be read or cropped. */
export class ImageError extends EvmError {}

/** A bundle that is missing, damaged, or not for this runtime. */
export class BundleError extends EvmError {}

/** A missing feature of the browser or the server, or a failure of the runtime. */
export class ToolchainError extends EvmError {}

/** Return the first line of the message of an error. */
export function reason(error: unknown): string {
  return String(error instanceof Error ? error.message : error).trim().split("\n")[0] ?? "";
}
