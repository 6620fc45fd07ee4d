//! Commands about images.

use super::{
    args::{Changes, HistoryArgs, ImagesArgs, ImportArgs, LoadArgs, OutputType, PruneArgs, RmiArgs, SaveArgs},
    for_all,
    output::{self, Output, shortened},
    times,
};
use graphdriver::{
    CommitOptions, Engine, Loaded, Removed,
    image::{
        Changes as Instructions, Reference,
        archive::{Archive, Format},
    },
    progress::Interruptible,
};
use graphdriver_core::{ByteSize, Context, Digest, Error, ErrorKind, Result};
use std::{io::IsTerminal, path::Path};

pub(crate) fn load(engine: &Engine, out: &Output, args: &LoadArgs) -> Result<()> {
    let stdin = args.input.as_path() == Path::new("-");
    let doing = || if stdin { "loading standard input".into() } else { format!("loading {}", args.input.display()) };
    let scratch = engine.temporary_dir()?;
    let archive = if stdin {
        if std::io::stdin().is_terminal() {
            return Err(Error::new(ErrorKind::InvalidInput, "standard input is a terminal, not an image archive")
                .hint("name the archive with -i FILE, or redirect it"));
        }
        Archive::from_file(Interruptible::stdin(engine.cancel())?, &scratch)
    } else {
        Archive::open(&args.input, &scratch, engine.cancel())
    };
    let loaded = engine.load(&archive.doing(doing)?).doing(doing)?;
    out.result(&loaded, |loaded| loaded.iter().flat_map(|one| loaded_lines(one, args.quiet)).collect())
}

fn loaded_lines(one: &Loaded, quiet: bool) -> Vec<String> {
    if quiet {
        return vec![one.id.to_string()];
    }
    if one.names.is_empty() {
        return vec![format!("Loaded image ID: {}", one.id)];
    }
    one.names.iter().map(|name| format!("Loaded image: {name}")).collect()
}

pub(crate) fn save(engine: &Engine, args: &SaveArgs) -> Result<()> {
    let format = match args.output_type {
        OutputType::Docker => Format::Docker,
        OutputType::Oci => Format::Oci,
    };
    output::to_file(args.output.as_deref(), |out| engine.save(&args.images, format, out))
}

/// `-a`, `-m` and `-c`, read before any work begins.
pub(crate) fn options(changes: &Changes, author: Option<&str>) -> Result<CommitOptions> {
    Ok(CommitOptions {
        author: author.map(str::to_owned),
        message: changes.message.clone(),
        changes: Instructions::parse(&changes.changes)?,
    })
}

pub(crate) fn import(engine: &Engine, out: &Output, args: &ImportArgs) -> Result<()> {
    let name = args.name.as_deref().map(str::parse::<Reference>).transpose()?;
    let options = options(&args.changes, None)?;
    let id = if args.tar.as_path() == Path::new("-") {
        engine.import(Interruptible::stdin(engine.cancel())?, "-", None, name.as_ref(), &options)?
    } else {
        let source = args.tar.display().to_string();
        let file = Interruptible::open(&args.tar, engine.cancel()).doing(|| format!("opening {source}"))?;
        let meta = file.file().metadata()?;
        let size = meta.is_file().then_some(meta.len());
        engine.import(file, &source, size, name.as_ref(), &options)?
    };
    print_id(out, &id)
}

pub(crate) fn print_id(out: &Output, id: &Digest) -> Result<()> {
    out.result(&serde_json::json!({ "ID": id }), |_| vec![id.to_string()])
}

pub(crate) fn list(engine: &Engine, out: &Output, args: &ImagesArgs) -> Result<()> {
    let images = engine.images(args.all)?;
    let id = |id: &Digest| if args.no_trunc { id.to_string() } else { id.short() };
    if args.quiet && !out.is_json() {
        let mut seen = std::collections::HashSet::new();
        return images.iter().filter(|i| seen.insert(i.id)).try_for_each(|i| output::line(id(&i.id)));
    }
    let mut header = vec!["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"];
    if args.digests {
        header.insert(2, "DIGEST");
    }
    out.list(&header, &images, |image| {
        let none = || "<none>".to_string();
        let mut row = vec![
            image.repository.clone().unwrap_or_else(none),
            image.tag.clone().unwrap_or_else(none),
            id(&image.id),
            times::ago_text(image.created.as_deref()),
            ByteSize(image.size).to_string(),
        ];
        if args.digests {
            row.insert(2, image.digest.map_or_else(none, |digest| digest.to_string()));
        }
        row
    })
}

pub(crate) fn history(engine: &Engine, out: &Output, args: &HistoryArgs) -> Result<()> {
    let steps = engine.history(&args.image)?;
    let width = if args.no_trunc { usize::MAX - 1 } else { 60 };
    out.list(&["CREATED", "CREATED BY", "SIZE", "COMMENT"], &steps, |step| {
        vec![
            times::ago_text(step.created.as_deref()),
            shortened(&step.created_by, width),
            ByteSize(step.size).to_string(),
            shortened(&step.comment, width),
        ]
    })
}

pub(crate) fn remove(engine: &Engine, out: &Output, args: &RmiArgs) -> Result<()> {
    let mut all = Vec::new();
    let outcome = for_all(&args.images, |image| {
        let removed = engine.remove_image(image, args.force).doing(|| format!("removing image {image}"))?;
        all.extend(removed);
        Ok(())
    });
    print_removed(out, &all)?;
    outcome
}

pub(crate) fn prune(engine: &Engine, out: &Output, args: &PruneArgs) -> Result<()> {
    let before = engine.disk_usage()?.images_size;
    let removed = engine.prune_images(args.all)?;
    print_removed(out, &removed)?;
    if out.is_json() {
        return Ok(());
    }
    let freed = before.saturating_sub(engine.disk_usage()?.images_size);
    output::line(format_args!("Total reclaimed space: {}", ByteSize(freed)))
}

fn print_removed(out: &Output, removed: &[Removed]) -> Result<()> {
    out.result(&removed, |removed| {
        let text = |one: &Removed| match one {
            Removed::Untagged(name) => format!("Untagged: {name}"),
            Removed::Deleted(id) => format!("Deleted: {id}"),
        };
        removed.iter().map(text).collect()
    })
}
