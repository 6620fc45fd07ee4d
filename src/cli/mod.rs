//! One file per group of commands; this one has what they share.

mod args;
mod bench;
mod containers;
mod generate;
mod images;
mod mounts;
mod output;
mod progress;
mod quota;
#[cfg(feature = "containerd")]
mod snapshotter;
mod system;
mod times;

use args::{BenchCommand, Cli, Command, ImageCommand};
use graphdriver::{Engine, config, progress::Cancel, registry};
use graphdriver_core::{Error, ErrorKind, Result};
use output::Output;
use std::{io::IsTerminal, process::ExitCode};

/// Runs the command line and turns its outcome into an exit code.
pub(crate) fn main() -> ExitCode {
    if std::env::args_os().len() == 1 {
        // clap's own switch for this is off as soon as a variable gives an option a value.
        eprint!("{}", Cli::definition().render_help());
        return ExitCode::from(2);
    }
    let cli = Cli::typed();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if output::reader_went_away(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("graphdriver: {e}");
            ExitCode::from(exit_code(e.kind()))
        }
    }
}

/// As the README lists them. 2 is also what clap says of wrong usage.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::InvalidInput => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::AlreadyExists => 4,
        ErrorKind::Busy => 5,
        ErrorKind::Unsupported => 6,
        ErrorKind::PermissionDenied => 7,
        ErrorKind::OutOfSpace | ErrorKind::QuotaExceeded => 8,
        ErrorKind::Corrupt => 9,
        ErrorKind::Interrupted => 130,
        _ => 1,
    }
}

fn run(mut cli: Cli) -> Result<()> {
    let out = Output::new(cli.global.format);
    match &cli.command {
        Command::Completions { shell } => return generate::completions(*shell),
        Command::Man { dir } => return generate::man(dir.as_deref()),
        _ => {}
    }
    let layer_options = cli.layer_options();
    if let Command::Create(args) = &mut cli.command {
        args.layer_options = layer_options;
    }
    let settings = config::Settings::resolve(cli.given())?;
    #[cfg(feature = "containerd")]
    if let Command::Snapshotter(args) = cli.command {
        return snapshotter::snapshotter(settings, args);
    }
    log_to_stderr(settings.debug);
    if let Command::Drivers = cli.command {
        registry::check_known(&settings.storage_opts)?;
        return system::drivers(&out, &settings);
    }
    let cancel = Cancel::default();
    stop_on_signals(&cancel)?;
    if let Command::Bench { command: BenchCommand::WriteAmplification(args) } = cli.command {
        return bench::write_amplification(&out, args, &cli.global, &cancel);
    }
    let mut engine = match cli.command {
        Command::Check(_) => Engine::open_as_it_is(settings)?,
        _ => Engine::open(settings)?,
    };
    engine.cancel_by(cancel);
    if let Some(bars) = progress::Bars::on_terminal() {
        engine.report_to(Box::new(bars));
    }
    dispatch(&engine, &out, cli.command)
}

fn dispatch(engine: &Engine, out: &Output, command: Command) -> Result<()> {
    match command {
        Command::Drivers | Command::Bench { .. } | Command::Completions { .. } | Command::Man { .. } => {
            unreachable!("run() has done these")
        }
        #[cfg(feature = "containerd")]
        Command::Snapshotter(_) => unreachable!("run() has done it"),
        Command::Info => system::info(engine, out),
        Command::Df(args) => system::df(engine, out, &args),
        Command::Check(args) => system::check(engine, out, &args),
        Command::Events(args) => system::events(engine, out, &args),
        Command::Load(args) => images::load(engine, out, &args),
        Command::Save(args) => images::save(engine, &args),
        Command::Import(args) => images::import(engine, out, &args),
        Command::Images(args) => images::list(engine, out, &args),
        Command::History(args) => images::history(engine, out, &args),
        Command::Tag { image, name } => engine.tag(&image, &name.parse()?),
        Command::Rmi(args) => images::remove(engine, out, &args),
        Command::Image { command: ImageCommand::Prune(args) } => images::prune(engine, out, &args),
        Command::Inspect(args) => system::inspect(engine, &args),
        Command::Create(args) => containers::create(engine, out, &args),
        Command::Ps(args) => containers::list(engine, out, &args),
        Command::Rename { container, name } => engine.rename(&container, &name),
        Command::Rm(args) => containers::remove(engine, out, &args),
        Command::Diff { container } => containers::diff(engine, out, &container),
        Command::Cp(args) => containers::copy(engine, &args),
        Command::Commit(args) => containers::commit(engine, out, &args),
        Command::Export(args) => containers::export(engine, &args),
        Command::Mount(args) => mounts::mount(engine, out, &args),
        Command::Umount(args) => mounts::umount(engine, &args),
        Command::Mounts => mounts::list(engine, out),
        Command::Quota(args) => quota::quota(engine, out, &args),
    }
}

fn log_to_stderr(debug: bool) {
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::WARN };
    let stderr = std::io::stderr;
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .without_time()
        // It would tell them on standard error, and panic if that is what failed.
        .log_internal_errors(false)
        .init();
}

/// The first signal asks the work to stop and undo itself; a second one ends the process at once, and what is left then
/// the next command undoes.
fn stop_on_signals(cancel: &Cancel) -> Result<()> {
    use signal_hook::{consts, flag};
    for signal in [consts::SIGINT, consts::SIGTERM, consts::SIGHUP] {
        flag::register_conditional_shutdown(signal, 130, cancel.0.clone())?;
        flag::register(signal, cancel.0.clone())?;
    }
    Ok(())
}

/// Runs `each` for every argument, so that one failure does not keep the others from being done. The first error counts.
fn for_all<T: std::fmt::Display>(items: &[T], each: impl FnMut(&T) -> Result<()>) -> Result<()> {
    all(items.iter().map(each))
}

/// Takes every outcome. The first error counts, and the others are told at once.
fn all(outcomes: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let mut first = None::<Error>;
    for e in outcomes.into_iter().filter_map(Result::err) {
        match &first {
            None => first = Some(e),
            Some(_) => eprintln!("graphdriver: {e}"),
        }
    }
    first.map_or(Ok(()), Err)
}
