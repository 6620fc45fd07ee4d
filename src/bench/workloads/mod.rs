//! What containers do to their image. Every random choice comes from a fixed seed, so that all subjects do the same.

mod data;
mod database;
mod files;

use super::{meter::Meter, results::Sample, stand::Stand};
use crate::progress::Cancel;
use graphdriver_core::{ByteSize, Context, Result};
use std::{fs::File, io::Write, path::Path};

/// What programs read and write at a time.
const BLOCK: u64 = 4 << 10;

/// The seed of everything random.
const SEED: u64 = 0x6772_6170_6864_7276;

/// What came of one repetition, by the names under which it is told: some workloads tell more than their own.
pub(super) type Named = Vec<(&'static str, Sample)>;

/// A workload with its cases.
#[derive(Debug)]
pub(super) struct Workload {
    pub name: &'static str,
    pub cases: fn(&Sizes) -> Vec<Case>,
    /// Runs one repetition.
    pub run: fn(&mut Run<'_>, &Case) -> Result<Named>,
}

/// One case of a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    /// For the reader: `64 KiB`, `10% of 64 MiB`. Cases of other sizes have other names.
    pub label: String,
    /// The number in it.
    pub x: u64,
    /// How many layers its image has.
    pub layers: usize,
}

impl Case {
    fn new(label: impl Into<String>, x: u64) -> Case {
        Case { label: label.into(), x, layers: 1 }
    }

    /// Images of 1, 10 and 100 layers; `of` is what is written to there, in words.
    fn depths(of: &str) -> Vec<Case> {
        let label = |layers| if layers == 1 { "1 layer".into() } else { format!("{layers} layers") };
        [1, 10, 100]
            .map(|layers| Case { layers, ..Case::new(format!("{} ({of})", label(layers)), layers as u64) })
            .into()
    }
}

/// How large the files of an image are, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    /// As asked for; a multiple of a block.
    pub large: u64,
}

impl Sizes {
    /// Of the file that is rewritten.
    pub fn medium(self) -> u64 {
        self.large.min(64 << 20)
    }

    /// What a run needs of its scratch directory at the most.
    pub fn room(self) -> u64 {
        // A large file and its copy; ten containers with copies of the medium one, and of its plain directories.
        (2 * self.large + self.large / 4).max(12 * self.medium()) + (1 << 30)
    }
}

/// All of them, in the order of the table.
pub(super) const ALL: &[Workload] = &[
    Workload { name: "first-write", cases: data::sizes, run: data::first_write },
    Workload { name: "rewrite", cases: data::shares, run: data::rewrite },
    Workload { name: "append", cases: data::whole, run: data::append },
    Workload { name: "chmod", cases: files::many, run: files::chmod },
    Workload { name: "chown", cases: files::many, run: files::chown },
    Workload { name: "delete-recreate", cases: files::many, run: files::delete_recreate },
    Workload { name: "sqlite", cases: database::updates, run: database::sqlite },
    Workload { name: "create", cases: files::many, run: files::create },
    Workload { name: "depth", cases: data::depths, run: data::depth },
    Workload { name: "depth-chmod", cases: files::depths, run: files::chmod_depth },
    Workload { name: "containers", cases: data::numbers, run: data::containers },
];

/// One repetition of a case on a fresh stand.
pub(super) struct Run<'a> {
    pub stand: Stand,
    pub sizes: Sizes,
    pub cancel: &'a Cancel,
}

impl Run<'_> {
    /// Adds a layer to the image.
    fn layer(&mut self, fill: impl FnOnce(&Path, &Cancel) -> Result<()>) -> Result<()> {
        self.stand.layer(|dir| fill(dir, self.cancel))
    }

    /// Adds layers of one small file until the image has so many.
    fn deepen(&mut self, layers: usize) -> Result<()> {
        (1..layers)
            .try_for_each(|n| self.layer(|dir, _| Ok(std::fs::write(dir.join(format!("layer{n}")), [n as u8; 100])?)))
    }

    /// Makes so many containers, of which nothing is cached. Returns what the filesystem held before.
    fn containers(&mut self, number: u64) -> Result<u64> {
        let used = self.forget()?;
        for _ in 0..number {
            self.cancel.check()?;
            self.stand.container()?;
        }
        self.forget()?;
        Ok(used)
    }

    /// See [`Stand::forget`].
    fn forget(&mut self) -> Result<u64> {
        self.stand.sync()?;
        self.stand.forget()
    }

    /// Begins to count.
    fn meter(&self) -> Result<Meter<'_>> {
        Meter::begin(&self.stand, self.cancel)
    }

    /// Adds what the containers hold; `used` is what the filesystem held before they were made. They are unmounted for it, as
    /// filesystems give back then what they took in advance.
    fn weigh(&mut self, used: u64, sample: &mut Sample) -> Result<()> {
        let now = self.forget()?;
        sample.space = self.stand.space()?;
        sample.space_on_device = sample.space.map(|_| now.saturating_sub(used));
        Ok(())
    }

    /// The size of the exported diff. Not before the last is counted: to export, some drivers make snapshots, which are cleared
    /// away long afterwards.
    fn diff(&self) -> Result<Option<u64>> {
        self.stand.diff(self.cancel).doing(|| "exporting the diff")
    }

    /// The sample with all that is to be added after counting.
    fn finish(&mut self, used: u64, mut sample: Sample) -> Result<Sample> {
        self.weigh(used, &mut sample)?;
        sample.diff = self.diff()?;
        Ok(sample)
    }

    /// The root of the only container.
    fn root(&self) -> &Path {
        self.stand.containers()[0].path()
    }
}

/// `1 GiB`; of what is no whole number of a unit, the next smaller unit.
pub(super) fn binary(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0 && bytes.is_multiple_of(1 << shift)) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => ByteSize(bytes).to_string(),
    }
}

/// Fills a file with bytes that do not compress.
fn fill(path: &Path, size: u64, random: &mut fastrand::Rng, cancel: &Cancel) -> Result<()> {
    let mut file = File::create(path)?;
    let mut buffer = vec![0; size.min(1 << 20) as usize];
    let mut left = size;
    while left > 0 {
        cancel.check()?;
        let part = &mut buffer[..left.min(1 << 20) as usize];
        random.fill(part);
        file.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

fn random() -> fastrand::Rng {
    fastrand::Rng::with_seed(SEED)
}

/// A block that does not compress.
fn block(random: &mut fastrand::Rng) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    random.fill(&mut block);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_whole_units() {
        let told = [64 << 10, 1 << 20, 1 << 30, 1536 << 20, 4 << 10].map(binary);
        assert_eq!(told, ["64 KiB", "1 MiB", "1 GiB", "1536 MiB", "4 KiB"]);
    }

    #[test]
    fn a_smaller_size_leaves_larger_cases_out() {
        let labels = |large| {
            let cases = (ALL[0].cases)(&Sizes { large });
            cases.into_iter().map(|case| case.label).collect::<Vec<_>>()
        };
        assert_eq!(labels(1 << 30), ["64 KiB", "1 MiB", "64 MiB", "1 GiB"]);
        assert_eq!(labels(8 << 20), ["64 KiB", "1 MiB", "8 MiB"]);
        assert_eq!(labels(64 << 10), ["64 KiB"]);
    }

    #[test]
    fn cases_whose_files_depend_on_the_size_have_it_in_their_names() {
        let labels = |large| {
            let cases = ALL.iter().flat_map(|workload| (workload.cases)(&Sizes { large }));
            cases.map(|case| case.label).collect::<Vec<_>>()
        };
        let (small, large) = (labels(1 << 20), labels(1 << 30));
        for label in ["1% of 1 MiB", "1 container (1 MiB)", "10 layers (1 MiB)", "200 updates of 1024 rows"] {
            assert!(small.iter().any(|known| known == label), "{label}: {small:?}");
        }
        for label in ["100% of 64 MiB", "10 containers (64 MiB)", "64 MiB", "200 updates of 16384 rows"] {
            assert!(large.iter().any(|known| known == label), "{label}: {large:?}");
        }
    }

    #[test]
    fn the_same_data_come_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str| fill(&dir.path().join(name), (1 << 20) + 5, &mut random(), &Cancel::default()).unwrap();
        write("a");
        write("b");
        let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        assert!(read("a") == read("b") && read("a").len() == (1 << 20) + 5);
        assert_eq!(block(&mut random()), block(&mut random()));
    }
}
