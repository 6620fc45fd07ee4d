//! What can be typed. The doc comments are the help texts.

#[cfg(feature = "containerd")]
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{
    Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint,
};
use clap_complete::Shell;
use graphdriver::config::Given;
use graphdriver_core::ByteSize;
use std::path::PathBuf;

/// The storage layer of a container engine: image layers, writable layers and mounts.
///
/// Every default can be set in /etc/graphdriver/config.json (data-root, storage-driver, storage-opts, debug) and in
/// GRAPHDRIVER_* variables; flags beat variables beat the file.
#[derive(Debug, Parser)]
#[command(name = "graphdriver", version, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where all data lies [default: /var/lib/graphdriver; rootless ~/.local/share/graphdriver]
    #[arg(long, visible_alias = "data-root", global = true, env = "GRAPHDRIVER_DATA_ROOT", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub root: Option<PathBuf>,
    /// The storage driver [default: the one with data under the root, else the first that works; see `drivers`]
    #[arg(long, short = 's', global = true, env = "GRAPHDRIVER_STORAGE_DRIVER", value_name = "NAME")]
    pub storage_driver: Option<String>,
    /// An option of the storage driver, NAME=VALUE; for `create` also size=SIZE and inodes=NUMBER, the new container's limits
    ///
    /// In the variable GRAPHDRIVER_STORAGE_OPTS several are separated by commas.
    #[arg(long, value_name = "K=V", action = ArgAction::Append)]
    pub storage_opt: Vec<String>,
    /// The settings file; it must exist if named
    #[arg(long, global = true, env = "GRAPHDRIVER_CONFIG", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Log what is done to standard error
    #[arg(long, short = 'D', global = true, env = "GRAPHDRIVER_DEBUG", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_possible_values = true, value_parser = clap::builder::FalseyValueParser::new())]
    pub debug: Option<bool>,
    /// How lists and results are printed
    #[arg(long, global = true, env = "GRAPHDRIVER_FORMAT", value_name = "FORMAT", default_value = "table")]
    pub format: Format,
}

/// `--storage-opt` after a subcommand. clap's own global arguments let those after it replace those before it.
const AFTER: &str = "storage-opt-after";

fn with_storage_opt(command: clap::Command) -> clap::Command {
    command.mut_subcommands(|sub| {
        let help = "An option of the storage driver, NAME=VALUE; also before the command [see graphdriver --help]";
        let arg = Arg::new(AFTER).long("storage-opt").value_name("K=V").action(ArgAction::Append).help(help);
        with_storage_opt(sub.arg(arg))
    })
}

fn storage_opts_after(matches: &ArgMatches) -> Vec<String> {
    let Some((_, below)) = matches.subcommand() else { return Vec::new() };
    let here = below.get_many::<String>(AFTER).unwrap_or_default().cloned();
    here.chain(storage_opts_after(below)).collect()
}

impl Cli {
    /// What can be typed, as clap knows it.
    pub fn definition() -> clap::Command {
        with_storage_opt(Cli::command())
    }

    /// What was typed. Ends the process if that is wrong, or asks for help.
    pub fn typed() -> Cli {
        let matches = Cli::definition().get_matches();
        let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.format(&mut Cli::definition()).exit());
        cli.global.storage_opt.extend(storage_opts_after(&matches));
        cli
    }

    /// What flags and environment say to the settings. `size=` and `inodes=` belong to the container that `create` makes.
    pub fn given(&self) -> Given {
        let global = &self.global;
        let mut storage_opts = global.storage_opt.clone();
        if let Command::Create(_) = self.command {
            storage_opts.retain(|option| !is_layer_option(option));
        }
        if storage_opts.is_empty() {
            let text = std::env::var("GRAPHDRIVER_STORAGE_OPTS").unwrap_or_default();
            storage_opts = text.split(',').filter(|o| !o.is_empty()).map(str::to_owned).collect();
        }
        Given {
            file: global.config.clone(),
            data_root: global.root.clone(),
            storage_driver: global.storage_driver.clone(),
            storage_opts,
            debug: global.debug,
        }
    }

    /// The `size=` and `inodes=` options.
    pub fn layer_options(&self) -> Vec<String> {
        self.global.storage_opt.iter().filter(|o| is_layer_option(o)).cloned().collect()
    }
}

fn is_layer_option(option: &str) -> bool {
    matches!(option.split('=').next(), Some("size" | "inodes"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the storage drivers: which work here, and what the others lack
    Drivers,
    /// Show the driver in use, the data root and counts
    Info,
    /// Load images from an archive of `docker save`, an OCI archive or an OCI layout directory
    Load(LoadArgs),
    /// Write images into one archive
    Save(SaveArgs),
    /// Make an image from a tar of a root filesystem
    Import(ImportArgs),
    /// Write a container's whole tree as a tar
    Export(ExportArgs),
    /// List images
    Images(ImagesArgs),
    /// Show images, containers or snapshots as JSON
    Inspect(InspectArgs),
    /// Show how an image came to be, with the size of each step
    History(HistoryArgs),
    /// Give an image another name
    Tag {
        /// Name or id of the image
        image: String,
        /// The new name
        name: String,
    },
    /// Remove images
    Rmi(RmiArgs),
    /// Manage images
    Image {
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Create a container: a writable layer on top of an image
    Create(CreateArgs),
    /// List containers
    Ps(PsArgs),
    /// Give a container another name
    Rename {
        /// Name or id of the container
        container: String,
        /// The new name
        name: String,
    },
    /// Remove containers
    Rm(RmArgs),
    /// List what a container changed: A added, C changed, D deleted
    Diff {
        /// Name or id of the container
        container: String,
    },
    /// Copy files between a container and the host
    Cp(CpArgs),
    /// Make an image from what a container changed
    Commit(CommitArgs),
    /// Show an image (read-only) or a container at a directory
    Mount(MountArgs),
    /// Take down mounts
    #[command(visible_alias = "unmount")]
    Umount(UmountArgs),
    /// List what is mounted
    Mounts,
    /// Show and change what containers may take on disk
    Quota(QuotaArgs),
    /// Show what images and containers take on disk
    Df(DfArgs),
    /// Look for damage, leftovers and strangers in the whole store, and change nothing
    ///
    /// The exit code is 9 if there is any. What killed commands have left, the next other command undoes.
    Check(CheckArgs),
    /// Show what happened
    Events(EventsArgs),
    /// Serve containerd as a proxy snapshotter
    #[cfg(feature = "containerd")]
    Snapshotter(SnapshotterArgs),
    /// Measure storage drivers
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page, or write all of them into a directory
    Man {
        /// Write graphdriver.1 and a page for each command here
        #[arg(long, short = 'o', value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Remove unnamed images that nothing uses
    Prune(PruneArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure what reaches the disk when containers change files of their image
    ///
    /// For every driver that works here, and for a plain directory beside it: bytes written to and read from the disk,
    /// latencies, space, size of the diff, processor time. Each runs on a loop device of its own, which nothing else
    /// writes to and of which nothing is left. Needs root. Times are those of the machine: what else runs spoils them. For
    /// zfs the caches of the whole machine are dropped again and again.
    WriteAmplification(WriteAmplificationArgs),
}

#[derive(Debug, Args)]
pub(crate) struct WriteAmplificationArgs {
    /// Which drivers, with commas between them [default: --storage-driver if that is given, else all that work here]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub drivers: Vec<String>,
    /// Which filesystems, of ext4, xfs, btrfs and zfs [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub filesystems: Vec<String>,
    /// Which workloads, of first-write, rewrite, append, chmod, chown, delete-recreate, sqlite, create, depth and containers
    /// [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub workloads: Vec<String>,
    /// Size of the large file in the image; cases with larger ones are left out
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub size: ByteSize,
    /// How often each case runs, on a fresh filesystem each time
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repetitions: u32,
    /// Write results.json, report.html and picture.svg into this directory, which is made if need be; earlier results in it
    /// are replaced, and other files are not
    #[arg(long, short = 'o', value_name = "DIR", default_value = "graphdriver-bench", value_hint = ValueHint::DirPath)]
    pub output: PathBuf,
    /// Show what changed since an earlier run, and fail if more reaches the disk than then
    #[arg(long, value_name = "OLD.json", value_hint = ValueHint::FilePath)]
    pub compare: Option<PathBuf>,
    /// How much more is too much for --compare, beyond what repetitions differ by
    #[arg(long, value_name = "PERCENT", default_value = "10%", requires = "compare", value_parser = percent)]
    pub threshold: f64,
    /// Where the loop devices' files lie: a directory with room for twice the large file and 1 GiB [default: TMPDIR, else
    /// /var/tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub scratch: Option<PathBuf>,
}

/// A share, from `20%` or `20`.
fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>().ok();
    let share = number.filter(|number| number.is_finite() && *number >= 0.0).map(|number| number / 100.0);
    share.ok_or_else(|| format!("{text:?} is no percentage; write 20%"))
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// The archive, plain or compressed, or an OCI layout directory; - is standard input
    #[arg(long, short = 'i', value_name = "FILE", default_value = "-", value_hint = ValueHint::AnyPath)]
    pub input: PathBuf,
    /// Print only the ids
    #[arg(long, short = 'q')]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The archive to write; standard output if it is no terminal
    #[arg(long, short = 'o', value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Its format
    #[arg(long, value_name = "TYPE", default_value = "docker")]
    pub output_type: OutputType,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputType {
    /// What `docker save` writes and everybody loads.
    Docker,
    /// An OCI image layout in a tar.
    Oci,
}

#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// Apply a Dockerfile instruction: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR
    #[arg(long = "change", short = 'c', value_name = "INSTRUCTION")]
    pub changes: Vec<String>,
    /// Note why
    #[arg(long, short = 'm', value_name = "TEXT")]
    pub message: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The tar, plain or compressed by gzip or zstd; - is standard input
    #[arg(value_name = "TAR", value_hint = ValueHint::FilePath)]
    pub tar: PathBuf,
    /// The new image's name
    pub name: Option<String>,
    #[command(flatten)]
    pub changes: Changes,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Name or id of the container
    pub container: String,
    /// The tar to write; standard output if it is no terminal
    #[arg(long, short = 'o', value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Also unnamed images that others were committed from
    #[arg(long, short = 'a')]
    pub all: bool,
    /// Also the digest of each image's manifest
    #[arg(long)]
    pub digests: bool,
    /// Print only ids
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub no_trunc: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Look only for these
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<ObjectType>,
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ObjectType {
    /// Images.
    Image,
    /// Containers.
    Container,
    /// Snapshots of containerd's, which are looked for only if asked for.
    Snapshot,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Name or id of the image
    pub image: String,
    /// Do not shorten steps
    #[arg(long)]
    pub no_trunc: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Remove all names of an image given by id; of an image in use, only the names
    #[arg(long, short = 'f')]
    pub force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Also named images that no container uses
    #[arg(long, short = 'a')]
    pub all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name [default: the first 12 digits of its id]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Name or id of the image
    pub image: String,
    #[arg(skip)]
    pub layer_options: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Shows all in any case; for those used to Docker
    #[arg(long, short = 'a', hide = true)]
    pub all: bool,
    /// Also measure what each wrote
    #[arg(long)]
    pub size: bool,
    /// Print only ids
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub no_trunc: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Unmount first
    #[arg(long, short = 'f')]
    pub force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Keep owners [default: files in the container become root's, files on the host the caller's]
    #[arg(long, short = 'a')]
    pub archive: bool,
    /// Copy what a symlink SOURCE points to
    #[arg(long, short = 'L')]
    pub follow_link: bool,
    /// CONTAINER:PATH, a path on the host, or - for a tar on standard input
    pub source: String,
    /// CONTAINER:PATH, a path on the host, or - for a tar on standard output
    pub destination: String,
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// Note who made it
    #[arg(long, short = 'a', value_name = "NAME")]
    pub author: Option<String>,
    #[command(flatten)]
    pub changes: Changes,
    /// Name or id of the container
    pub container: String,
    /// The new image's name
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// Show a container read-only; images always are
    #[arg(long, short = 'r')]
    pub read_only: bool,
    /// Name or id of an image or container
    #[arg(value_name = "IMAGE|CONTAINER")]
    pub what: String,
    /// An existing directory
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct UmountArgs {
    /// Detach mounts that are in use; they vanish with their last user
    #[arg(long, short = 'l')]
    pub lazy: bool,
    /// Directories, or names or ids of images or containers
    #[arg(required = true, value_name = "DIR|CONTAINER")]
    pub what: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct QuotaArgs {
    /// Names or ids; all, if none is named
    #[arg(value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// The most bytes each may take from now on, like 10G; none: as much as there is
    #[arg(long, value_name = "SIZE", requires = "containers")]
    pub size: Option<String>,
    /// The most files, directories and all else; none: as many as there are
    #[arg(long, value_name = "NUMBER", requires = "containers")]
    pub inodes: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DfArgs {
    /// A line for each image and container
    #[arg(long, short = 'v')]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Also read every image layer, and compare it with its digest
    #[arg(long)]
    pub digests: bool,
}

#[cfg(feature = "containerd")]
#[derive(Debug, Args)]
pub(crate) struct SnapshotterArgs {
    /// The unix socket to listen on, unless systemd hands one over
    #[arg(long, value_name = "PATH", default_value = "/run/graphdriver/snapshotter.sock", value_hint = ValueHint::FilePath,
        value_parser = TypedValueParser::try_map(PathBufValueParser::new(), socket_path))]
    pub socket: PathBuf,
    /// containerd's socket, to whose content store layer tars go if it asks for them
    #[arg(long, value_name = "ADDRESS", default_value = "/run/containerd/containerd.sock",
        value_hint = ValueHint::FilePath, value_parser = TypedValueParser::try_map(PathBufValueParser::new(), socket_path))]
    pub containerd: PathBuf,
    /// Answer Prometheus at http://ADDRESS/metrics, an address of this host alone such as 127.0.0.1:9324
    #[arg(long, value_name = "ADDRESS", value_parser = metrics_address)]
    pub metrics: Option<std::net::SocketAddr>,
    /// How the log on standard error is written
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Print what to put into a file that containerd's config.toml imports, and end
    #[arg(long)]
    pub print_containerd_config: bool,
}

/// containerd's tools take URLs, too; as a path one would be a directory `unix:` somewhere.
#[cfg(feature = "containerd")]
fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    let url = path.to_str().and_then(|text| text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")));
    match url {
        Some(path) => Err(format!("it is a path, and no URL: write {path}")),
        None => Ok(path),
    }
}

#[cfg(feature = "containerd")]
fn metrics_address(text: &str) -> Result<std::net::SocketAddr, String> {
    text.parse().map_err(|_| "write the number of an address, and a port: 127.0.0.1:9324 or [::1]:9324".into())
}

#[cfg(feature = "containerd")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// A document of JSON for each line.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Not before: 2026-01-31T12:00:00Z, seconds since 1970, or a span back from now such as 10m
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Not after
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// type=, event=, image= or container= and a value
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// Go on with what happens from now
    #[arg(long)]
    pub follow: bool,
}
