//! What copy-on-write costs: each driver on a device of its own, whose traffic is counted.
//!
//! A *subject* is a driver on a filesystem, or a plain directory there, which is the baseline. A *workload* is what a
//! container does to its image; each of its cases runs on a fresh filesystem, as often as asked for.

pub mod compare;
pub mod device;
mod medium;
mod meter;
pub mod output;
mod plan;
pub mod report;
pub mod results;
mod stand;
mod workloads;

pub use plan::FILESYSTEMS;

use crate::progress::{Cancel, Progress};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Options as DriverOptions, Result};
use medium::{Kind, Medium};
use nix::sched::{CloneFlags, unshare};
use plan::Plan;
use results::{FORMAT, Host, Measurement, Results, Skipped, Subject};
use rustix::{
    fs::statvfs,
    mount::{MountPropagationFlags, mount_change},
    system::{sysinfo, uname},
};
use stand::Stand;
use std::path::{Path, PathBuf};
use workloads::{Case, Named, Run, Sizes, Workload};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Names of drivers; empty: all.
    pub drivers: Vec<String>,
    /// Of [`FILESYSTEMS`]; empty: all.
    pub filesystems: Vec<String>,
    /// Names of workloads; empty: all.
    pub workloads: Vec<String>,
    /// Size of the large lower file, at least 64 KiB.
    pub size: ByteSize,
    /// How often each case runs.
    pub repetitions: u32,
    /// The directory for the sparse files below the devices.
    pub scratch: PathBuf,
    /// For the drivers that know them.
    pub storage_opts: DriverOptions,
}

/// See [`plan`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Planned {
    /// Names of [`Subject`]s.
    pub subjects: Vec<String>,
    /// Whether these are all that there are: no choice was made.
    pub everything: bool,
    /// Names of workloads, each with a case of it.
    pub cases: Vec<(String, String)>,
    /// Size of the large lower file, in bytes.
    pub size: u64,
}

impl Planned {
    /// Whether it is to be measured, or was to.
    pub fn has(&self, one: &Measurement) -> bool {
        // The second pass is told apart, and runs with the first.
        let workload = one.workload.strip_suffix("-again").unwrap_or(&one.workload);
        (self.everything || self.subjects.contains(&one.subject))
            && self.cases.iter().any(|(name, case)| name == workload && *case == one.case)
    }
}

/// The smallest size of the large lower file.
const LEAST: u64 = 64 << 10;

/// The largest: beyond what any device holds, and far from where sums of it overflow.
const MOST: u64 = 1 << 50;

/// What the devices have besides room for large files.
const ROOM: u64 = 4 << 30;

/// The names of the workloads.
pub fn workload_names() -> impl Iterator<Item = &'static str> {
    workloads::ALL.iter().map(|workload| workload.name)
}

/// What a run is to measure, if nothing fails.
///
/// # Errors
///
/// If there are no such drivers, filesystems or workloads, or some of them do not go together.
pub fn plan(options: &Options) -> Result<Planned> {
    let plans = plan::subjects(&options.drivers, &options.filesystems, &options.storage_opts)?;
    let sizes = Sizes { large: options.size.0.min(MOST) / 4096 * 4096 };
    let of = |workload: &&'static Workload| {
        let name = workload.name;
        (workload.cases)(&sizes).into_iter().map(move |case| (name.to_owned(), case.label)).collect::<Vec<_>>()
    };
    Ok(Planned {
        subjects: plans.into_iter().map(|plan| plan.name).collect(),
        everything: options.drivers.is_empty() && options.filesystems.is_empty() && options.storage_opts.0.is_empty(),
        cases: plan::workloads(&options.workloads)?.iter().flat_map(of).collect(),
        size: sizes.large,
    })
}

/// Measures. What cannot be measured, because something is missing or has failed, is in [`Results::skipped`].
///
/// Gives the calling thread, and those it starts afterwards, a mount namespace of its own, so that nothing stays mounted
/// when the process ends, however it ends. Needs root. For ZFS it drops the caches of the whole machine.
pub fn run(options: &Options, progress: &dyn Progress, cancel: &Cancel) -> Result<Results> {
    let plans = plan::subjects(&options.drivers, &options.filesystems, &options.storage_opts)?;
    let workloads = plan::workloads(&options.workloads)?;
    let sizes = check(options)?;
    isolate()?;
    let mut results = Results {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        began: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        host: host(&options.scratch)?,
        size: sizes.large,
        repetitions: options.repetitions,
        subjects: Vec::new(),
        measurements: Vec::new(),
        skipped: left_out(&workloads, sizes),
    };
    for (n, plan) in plans.iter().enumerate() {
        progress.advance("subjects", n as u64, Some(plans.len() as u64));
        let bench = Bench { plan, sizes, options, progress, cancel };
        match bench.describe() {
            Ok(subject) => results.subjects.push(subject),
            Err(e) => {
                // A signal from the terminal has reached the programs that were run, too.
                cancel.check()?;
                results.skipped.push(Skipped { subject: plan.name.clone(), workload: None, reason: e.to_string() });
                continue;
            }
        }
        bench.measure(&workloads, &mut results)?;
    }
    progress.finish("subjects");
    Ok(results)
}

fn check(options: &Options) -> Result<Sizes> {
    let invalid = |why: String| Error::new(ErrorKind::InvalidInput, why);
    if options.size.0 < LEAST {
        return Err(invalid(format!("the large file's size is {} bytes", options.size.0)).hint("64K is the smallest"));
    }
    if options.size.0 > MOST {
        return Err(invalid(format!("the large file's size is {} bytes", options.size.0)).hint("1024T is the largest"));
    }
    if options.repetitions == 0 {
        return Err(
            invalid("0 repetitions measure nothing".into()).hint("1 is the least, 3 tell how far results lie apart")
        );
    }
    if !rustix::process::geteuid().is_root() {
        let why = "measuring needs root, to make loop devices, format them and mount what is on them";
        return Err(
            Error::new(ErrorKind::PermissionDenied, why).hint("run it with sudo; nothing of it is left afterwards")
        );
    }
    let sizes = Sizes { large: options.size.0 / 4096 * 4096 };
    let scratch = &options.scratch;
    let doing = || format!("looking at the scratch directory {}", scratch.display());
    if !scratch.metadata().doing(doing)?.is_dir() {
        return Err(invalid(format!("{} is no directory", scratch.display())).hint("name one with --scratch"));
    }
    let there = statvfs(scratch).doing(doing)?;
    let free = there.f_bavail * there.f_frsize;
    if free < sizes.room() {
        let why = format!(
            "{} has {} free, and measuring with files of {} takes up to {}",
            scratch.display(),
            ByteSize(free),
            ByteSize(sizes.large),
            ByteSize(sizes.room())
        );
        return Err(
            Error::new(ErrorKind::OutOfSpace, why).hint("name another directory with --scratch, or a smaller --size")
        );
    }
    Ok(sizes)
}

/// Leaves the caller's mount namespace.
fn isolate() -> Result<()> {
    let unshared = unshare(CloneFlags::CLONE_NEWNS).map_err(std::io::Error::from);
    unshared.doing(|| "making a mount namespace").hint(|| "in a container it needs --privileged")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).doing(|| "making mounts private")
}

fn host(scratch: &Path) -> Result<Host> {
    let info = sysinfo();
    Ok(Host {
        kernel: uname().release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory: info.totalram * u64::from(info.mem_unit),
        scratch: medium::scratch(scratch)?,
    })
}

/// The cases of the usual size that a smaller one has no room for.
fn left_out(workloads: &[&Workload], sizes: Sizes) -> Vec<Skipped> {
    let mut all = Vec::new();
    for workload in workloads.iter().filter(|workload| workload.name == "first-write") {
        let usual = (workload.cases)(&Sizes { large: 1 << 30 });
        let larger: Vec<String> =
            usual.into_iter().filter(|case| case.x > sizes.large).map(|case| case.label).collect();
        if !larger.is_empty() {
            let size = workloads::binary(sizes.large);
            let reason = format!("files of {} are larger than {size}; --size 1G has them all", larger.join(" and "));
            all.push(Skipped { subject: "all".into(), workload: Some(workload.name.into()), reason });
        }
    }
    all
}

/// One subject under way.
struct Bench<'a> {
    plan: &'a Plan,
    sizes: Sizes,
    options: &'a Options,
    progress: &'a dyn Progress,
    cancel: &'a Cancel,
}

impl Bench<'_> {
    fn device_size(&self) -> u64 {
        4 * self.sizes.large + ROOM
    }

    /// The size of the filesystem on a thin device.
    fn volume(&self) -> u64 {
        2 * self.sizes.large + ROOM / 2
    }

    fn stand(&self) -> Result<Stand> {
        Stand::new(self.plan, &self.options.scratch, self.device_size(), self.volume())
    }

    /// Tries it out. Fails with what is missing, and how to get it.
    fn describe(&self) -> Result<Subject> {
        let plan = self.plan;
        let medium = Medium::new(plan.kind, &self.options.scratch, self.device_size());
        let unmet = match &medium {
            Ok(medium) => Stand::unmet(plan, medium, self.volume()),
            // Without the kernel's part there is no pool; the driver knows what brings it.
            Err(_) if plan.kind == Kind::Zfs && !Path::new("/dev/zfs").exists() => {
                crate::registry::status("zfs", &self.options.scratch, &plan.options).unmet
            }
            Err(_) => None,
        };
        if let Some(unmet) = unmet {
            return Err(Error::new(ErrorKind::Unsupported, unmet.missing).hint(unmet.remedy));
        }
        drop(medium?);
        self.cancel.check()?;
        let mut stand = self.stand()?;
        stand.layer(|_| Ok(()))?;
        stand.container()?;
        // Mounts of layers are shown in no table; of those on thin devices it is told what they were asked for.
        let asked = stand.recipe_options()?;
        let own = if plan.kind == Kind::Whole { asked.clone() } else { None };
        Ok(Subject {
            name: plan.name.clone(),
            driver: plan.driver.map(str::to_owned),
            filesystem: plan.filesystem.clone(),
            mount_options: own.map_or_else(|| stand.medium().mount_options(), Ok)?,
            layer_options: asked,
            made_with: plan.kind.made_with(),
            driver_options: plan.options.0.iter().cloned().collect(),
            strategy: stand.strategy().unwrap_or_else(|| in_place(plan.kind).into()),
        })
    }

    fn measure(&self, workloads: &[&Workload], results: &mut Results) -> Result<()> {
        let cases: Vec<(&Workload, Case)> = workloads
            .iter()
            .flat_map(|workload| (workload.cases)(&self.sizes).into_iter().map(move |case| (*workload, case)))
            .collect();
        for (n, (workload, case)) in cases.iter().enumerate() {
            self.progress.advance(&self.plan.name, n as u64, Some(cases.len() as u64));
            match self.repeat(workload, case) {
                Ok(measured) => results.measurements.extend(measured),
                Err(e) => {
                    self.cancel.check()?;
                    results.skipped.push(Skipped {
                        subject: self.plan.name.clone(),
                        workload: Some(workload.name.into()),
                        reason: format!("{}: {e}", case.label),
                    });
                }
            }
        }
        self.progress.finish(&self.plan.name);
        Ok(())
    }

    fn repeat(&self, workload: &Workload, case: &Case) -> Result<Vec<Measurement>> {
        let mut all: Vec<Measurement> = Vec::new();
        for _ in 0..self.options.repetitions {
            self.cancel.check()?;
            for (name, sample) in self.once(workload, case)? {
                match all.iter_mut().find(|measurement| measurement.workload == name) {
                    Some(measurement) => measurement.samples.push(sample),
                    None => all.push(Measurement {
                        subject: self.plan.name.clone(),
                        workload: name.into(),
                        case: case.label.clone(),
                        x: case.x,
                        samples: vec![sample],
                    }),
                }
            }
        }
        Ok(all)
    }

    fn once(&self, workload: &Workload, case: &Case) -> Result<Named> {
        let stand = self.stand()?;
        if case.layers > stand.max_depth() {
            let why = format!("the driver has at most {} layers", stand.max_depth());
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        (workload.run)(&mut Run { stand, sizes: self.sizes, cancel: self.cancel }, case)
    }
}

fn in_place(kind: Kind) -> &'static str {
    match kind {
        Kind::Btrfs | Kind::Zfs => "none (the filesystem itself redirects on write)",
        _ => "none (written in place)",
    }
}
