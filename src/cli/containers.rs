//! Commands about containers.

use super::{
    args::{CommitArgs, CpArgs, CreateArgs, ExportArgs, PsArgs, RmArgs},
    for_all, images,
    output::{self, Output},
    quota, times,
};
use graphdriver::{ContainerSummary, CopyOptions, CreateOptions, Engine, config, image::Reference};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, LayerOptions, Result};
use std::io::Write;

pub(crate) fn create(engine: &Engine, out: &Output, args: &CreateArgs) -> Result<()> {
    let mut layer = LayerOptions::default();
    for option in &args.layer_options {
        let (name, value) = config::parse_option(option)?;
        let doing = || format!("reading the storage option {option:?}");
        let twice = if name == "inodes" { layer.inodes.is_some() } else { layer.size.is_some() };
        if twice {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{name} is given twice"))).doing(doing);
        }
        match name.as_str() {
            "inodes" => layer.inodes = Some(quota::number_of_inodes(&value).doing(doing)?),
            _ => layer.size = Some(quota::size_limit(&value).doing(doing)?),
        }
    }
    let options = CreateOptions { name: args.name.clone(), layer };
    let id = engine.create(&args.image, &options).doing(|| format!("creating a container from {}", args.image))?;
    out.result(&serde_json::json!({ "ID": id }), |_| vec![id.clone()])
}

pub(crate) fn list(engine: &Engine, out: &Output, args: &PsArgs) -> Result<()> {
    let containers = engine.containers(args.size)?;
    let id = |c: &ContainerSummary| if args.no_trunc { c.id.clone() } else { c.id[..12].to_owned() };
    if args.quiet && !out.is_json() {
        return containers.iter().try_for_each(|c| output::line(id(c)));
    }
    let mut header = vec!["CONTAINER ID", "IMAGE", "CREATED", "MOUNTED AT", "NAMES"];
    if args.size {
        header.push("SIZE");
    }
    out.list(&header, &containers, |container| {
        let places: Vec<_> = container.mounts.iter().map(|place| place.display().to_string()).collect();
        let mut row = vec![
            id(container),
            container.image.clone(),
            times::ago(container.created),
            places.join(", "),
            container.name.clone(),
        ];
        row.extend(container.size.map(|size| ByteSize(size.bytes).to_string()));
        row
    })
}

pub(crate) fn remove(engine: &Engine, out: &Output, args: &RmArgs) -> Result<()> {
    for_all(&args.containers, |container| {
        engine.remove_container(container, args.force).doing(|| format!("removing container {container}"))?;
        if out.is_json() { Ok(()) } else { output::line(container) }
    })
}

pub(crate) fn diff(engine: &Engine, out: &Output, container: &str) -> Result<()> {
    let mut all = Vec::new();
    let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
    engine.diff(container, &mut |change| {
        if out.is_json() {
            let path = format!("/{}", change.path.display());
            all.push(serde_json::json!({ "Kind": change.kind.letter().to_string(), "Path": path }));
            return Ok(());
        }
        use std::os::unix::ffi::OsStrExt;
        write!(stdout, "{} /", change.kind.letter())?;
        stdout.write_all(change.path.as_os_str().as_bytes())?;
        Ok(writeln!(stdout)?)
    })?;
    stdout.flush()?;
    drop(stdout);
    if out.is_json() { output::json(&all) } else { Ok(()) }
}

pub(crate) fn copy(engine: &Engine, args: &CpArgs) -> Result<()> {
    let options = CopyOptions { keep_owners: args.archive, follow_link: args.follow_link };
    engine
        .copy(&args.source, &args.destination, &options)
        .map_err(output::cut_short)
        .doing(|| format!("copying {} to {}", args.source, args.destination))
}

pub(crate) fn commit(engine: &Engine, out: &Output, args: &CommitArgs) -> Result<()> {
    let name = args.name.as_deref().map(str::parse::<Reference>).transpose()?;
    let options = images::options(&args.changes, args.author.as_deref())?;
    let id = engine.commit(&args.container, name.as_ref(), &options)?;
    images::print_id(out, &id)
}

pub(crate) fn export(engine: &Engine, args: &ExportArgs) -> Result<()> {
    output::to_file(args.output.as_deref(), |out| engine.export(&args.container, out))
}
