//! The stand-alone program.

use clap::{ArgAction, Parser};
use graphdriver_core::{Error, ErrorKind, Result};
use graphdriver_vfs_fuse::{claim, daemon, extent, options};
use std::{ffi::OsString, io::IsTerminal, path::Path, process::ExitCode};
use tracing_subscriber::filter::LevelFilter;

const OPTIONS: &str = "\
Options after -o:
  layers      lowerdir=TOP:…:BOTTOM  lowerdir+=DIR  upperdir=DIR  workdir=DIR   (\\: \\, \\\\ in names)
  owners      uidmapping=DISK:SHOWN:COUNT[:…]  gidmapping=…  squash_to_root  squash_to_uid=N  squash_to_gid=N
              xattr_permissions=0|1|2
  view        static_nlink  noacl  noxattrs  userxattr  timeout=SECONDS
  work        copy_up=auto|reflink|extent|full  complete=commit|BYTES-PER-SECOND[K|M|G]  passthrough=0|1
              writeback=0|1  volatile  fsync=0|1  threads=N  threaded=0|1  wake_latency=auto|on|off  debug
  mount       ro rw  dev nodev  suid nosuid  exec noexec  atime noatime relatime  sync dirsync
              allow_other allow_root  auto_unmount  join  fsname=NAME  subtype=NAME  context=\"LABEL\"
  no effect   xino=on|off|auto  ino32_t  fast_ino_check=0|1  plugins=…  redirect_dir=…  metacopy=…  index=…
              nfs_export=…  uuid=…  default_permissions  clone_fd  max_idle_threads=N  max_read=N
              max_write=N  x-…  _netdev  noauto  user  and what else fstab(5) has";

/// A union filesystem in user space: shows directories as one, keeps changes in the topmost.
#[derive(Parser)]
#[command(name = "vfs-fuse", version, after_help = OPTIONS, override_usage = "\
vfs-fuse [-f] [-d] [-o OPTIONS]… [SOURCE] MOUNTPOINT
       vfs-fuse --complete -o lowerdir=…,upperdir=…,workdir=…")]
struct Arguments {
    /// Stay in the foreground
    #[arg(short, long)]
    foreground: bool,
    /// Stay in the foreground and print what is done
    #[arg(short, long)]
    debug: bool,
    /// Serve with one thread
    #[arg(short)]
    single: bool,
    /// Options, separated by commas
    #[arg(short, value_name = "OPTIONS", action = ArgAction::Append)]
    options: Vec<OsString>,
    /// Give files of the upper layer that hold only what was changed the rest of their data; mount nothing
    #[arg(long, conflicts_with_all = ["places", "foreground", "single"])]
    complete: bool,
    /// The directory to mount on, or /dev/fd/N for a mount made already; before it what /proc/mounts shows as mounted
    #[arg(value_name = "MOUNTPOINT", num_args = 1..=2, required_unless_present = "complete")]
    places: Vec<OsString>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => {
            let text = e.render().to_string();
            eprint!("vfs-fuse: {}", text.strip_prefix("error: ").unwrap_or(&text));
            return ExitCode::FAILURE;
        }
    };
    run(&arguments).unwrap_or_else(|error| {
        eprintln!("vfs-fuse: {error}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let (source, mountpoint) = match &arguments.places[..] {
        [source, mountpoint] => (Some(source.as_os_str()), Some(mountpoint)),
        places => (None, places.first()),
    };
    let mut parsed = options::parse(&arguments.options, source)?;
    let debug = arguments.debug || parsed.debug;
    if arguments.single {
        parsed.config.threads = Some(1);
    }
    log(debug);
    match mountpoint {
        Some(mountpoint) => daemon::mount(parsed, Path::new(mountpoint), arguments.foreground || debug),
        None => complete(parsed),
    }
}

fn log(debug: bool) {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(colours).init();
}

fn complete(parsed: options::Parsed) -> Result<ExitCode> {
    let config = parsed.config.resolved()?;
    let Some(upper) = &config.upper else {
        let error = Error::new(ErrorKind::InvalidInput, "--complete: no upperdir");
        return Err(error.hint("give the layer to complete, with the layers below it and its workdir"));
    };
    let work = config.work.as_deref().expect("options want both or none");
    let _claims = claim::claim_both(upper, work)?;
    let done = extent::complete_layer(&config)?;
    println!("{} files completed, {} bytes copied", done.files, done.bytes);
    Ok(ExitCode::SUCCESS)
}
