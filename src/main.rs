//! The command line of graphdriver.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
