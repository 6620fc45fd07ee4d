//! Completions and manual pages, out of the argument definitions.

use super::{args::Cli, output};
use clap_complete::Shell;
use graphdriver_core::{Context, Result};
use std::{io::Write, path::Path};

pub(crate) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::definition(), "graphdriver", &mut script);
    Ok(std::io::stdout().lock().write_all(&script)?)
}

pub(crate) fn man(dir: Option<&Path>) -> Result<()> {
    match dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).doing(|| format!("making {}", dir.display()))?;
            clap_mangen::generate_to(Cli::definition(), dir)
                .doing(|| format!("writing pages into {}", dir.display()))?;
            output::line(format_args!("{}", dir.join("graphdriver.1").display()))
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::definition()).render(&mut page)?;
            Ok(std::io::stdout().lock().write_all(&page)?)
        }
    }
}
