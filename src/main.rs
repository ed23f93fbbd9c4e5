//! The program: everything is in the library, see `afterimage::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage::cli::main()
}
