//! Commands about the whole.

use super::{
    args::{CheckArgs, DfArgs, EventsArgs, InspectArgs, ObjectType},
    output::{self, Output},
    times,
};
use graphdriver::{Checked, DiskUsage, Engine, EventFilter, FindingKind, Info, config::Settings, registry};
use graphdriver_core::{ByteSize, Error, ErrorKind, Result};
use serde::Serialize;

pub(crate) fn drivers(out: &Output, settings: &Settings) -> Result<()> {
    let header = ["NAME", "USABLE", "WRITE STRATEGY", "QUOTA", "NATIVE DIFF", "MISSING", "REMEDY"];
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_string();
    out.list(&header, &registry::survey(&settings.data_root, &settings.storage_opts), |driver| {
        let mut row = vec![driver.name.clone(), yes(driver.usable)];
        match (&driver.capabilities, &driver.unmet) {
            (Some(can), _) => row.extend([
                can.write_strategy.to_string(),
                yes(can.quota),
                yes(can.native_diff),
                String::new(),
                String::new(),
            ]),
            (_, Some(unmet)) => {
                row.extend(["-", "-", "-"].map(String::from));
                row.extend([unmet.missing.clone(), unmet.remedy.clone()]);
            }
            (None, None) => {}
        }
        row
    })
}

pub(crate) fn info(engine: &Engine, out: &Output) -> Result<()> {
    out.result(&engine.info()?, info_lines)
}

fn info_lines(info: &Info) -> Vec<String> {
    let mut lines = vec![format!("Storage Driver: {}", info.storage_driver)];
    lines.extend(info.driver_status.iter().map(|(key, value)| format!(" {key}: {value}")));
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    let can = &info.capabilities;
    lines.push(format!("Write Strategy: {}", can.write_strategy));
    lines.push(format!("Quota: {}", yes(can.quota)));
    lines.push(format!("Native Diff: {}", yes(can.native_diff)));
    lines.push(format!("Id-mapped Mounts: {}", yes(can.idmapped_mounts)));
    lines.push(format!("Maximum Depth: {}", can.max_depth));
    let options: Vec<_> = info.storage_options.iter().map(|(key, value)| format!("{key}={value}")).collect();
    lines.push(format!("Storage Options: {}", if options.is_empty() { "none".into() } else { options.join(", ") }));
    lines.push(format!("Data Root: {}", info.data_root.display()));
    lines.push(format!(" Filesystem: {}", info.data_root_filesystem));
    lines.push(format!(" Free: {}", ByteSize(info.data_root_free)));
    lines.push(format!("Kernel Version: {}", info.kernel_version));
    lines.push(format!("Version: {}", info.server_version));
    lines.push(format!("Images: {}", info.images));
    lines.push(format!("Containers: {}", info.containers));
    lines.push(format!("Snapshots: {}", info.snapshots));
    lines.push(format!("Layers: {}", info.layers));
    lines.push(format!("Mounts: {}", info.mounts));
    lines
}

pub(crate) fn inspect(engine: &Engine, args: &InspectArgs) -> Result<()> {
    let mut found = Vec::new();
    let mut missing = None;
    for name in &args.names {
        let one = match args.kind {
            Some(ObjectType::Image) => engine.inspect_image(name),
            Some(ObjectType::Container) => engine.inspect_container(name),
            Some(ObjectType::Snapshot) => engine.inspect_snapshot(name),
            None => engine.inspect(name),
        };
        match one {
            Ok(value) => found.push(value),
            Err(e) => drop(missing.get_or_insert(e)),
        }
    }
    // As Docker does: what was found is printed all the same.
    output::json(&found)?;
    missing.map_or(Ok(()), Err)
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Total {
    #[serde(rename = "Type")]
    kind: &'static str,
    total_count: usize,
    active: usize,
    size: u64,
    reclaimable: u64,
}

pub(crate) fn df(engine: &Engine, out: &Output, args: &DfArgs) -> Result<()> {
    let usage = engine.disk_usage()?;
    if args.verbose {
        return df_verbose(out, &usage);
    }
    let totals = [
        Total {
            kind: "Images",
            total_count: usage.images.len(),
            active: usage.images.iter().filter(|i| i.in_use).count(),
            size: usage.images_size,
            reclaimable: usage.images_reclaimable,
        },
        Total {
            kind: "Containers",
            total_count: usage.containers.len(),
            active: usage.containers.iter().filter(|c| c.mounted).count(),
            size: usage.containers_size,
            reclaimable: usage.containers_reclaimable,
        },
        Total {
            kind: "Snapshots",
            total_count: usage.snapshots.len(),
            active: usage.snapshots.iter().filter(|s| s.mounted).count(),
            size: usage.snapshots_size,
            reclaimable: 0,
        },
    ];
    out.list(&["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], &totals, |total| {
        let percent = (total.reclaimable * 100).checked_div(total.size).unwrap_or(0);
        vec![
            total.kind.into(),
            total.total_count.to_string(),
            total.active.to_string(),
            ByteSize(total.size).to_string(),
            format!("{} ({percent}%)", ByteSize(total.reclaimable)),
        ]
    })
}

fn df_verbose(out: &Output, usage: &DiskUsage) -> Result<()> {
    if out.is_json() {
        return output::json(usage);
    }
    let size = |bytes| ByteSize(bytes).to_string();
    let header = ["IMAGE", "IMAGE ID", "CREATED", "SIZE", "SHARED SIZE", "UNIQUE SIZE", "CONTAINERS"];
    out.list(&header, &usage.images, |image| {
        vec![
            if image.names.is_empty() { "<none>".into() } else { image.names.join(", ") },
            image.id.short(),
            times::ago_text(image.created.as_deref()),
            size(image.size),
            size(image.shared),
            size(image.unique),
            image.containers.to_string(),
        ]
    })?;
    output::line("")?;
    out.list(&["CONTAINER ID", "IMAGE ID", "SIZE", "CREATED", "MOUNTED", "NAMES"], &usage.containers, |container| {
        vec![
            container.id[..12].into(),
            container.image.short(),
            size(container.size),
            times::ago(container.created),
            if container.mounted { "yes" } else { "no" }.into(),
            container.name.clone(),
        ]
    })?;
    if usage.snapshots.is_empty() {
        return Ok(());
    }
    output::line("")?;
    out.list(&["SNAPSHOT", "KIND", "PARENT", "SIZE", "CREATED", "MOUNTED"], &usage.snapshots, |space| {
        vec![
            space.snapshot.name.clone(),
            space.snapshot.kind.to_string(),
            space.snapshot.parent.clone().unwrap_or_default(),
            size(space.size),
            times::ago(space.snapshot.created),
            if space.mounted { "yes" } else { "no" }.into(),
        ]
    })
}

pub(crate) fn check(engine: &Engine, out: &Output, args: &CheckArgs) -> Result<()> {
    let checked = engine.check(args.digests)?;
    out.result(&checked, check_lines)?;
    match checked.findings.len() {
        0 => Ok(()),
        1 => Err(Error::new(ErrorKind::Corrupt, "the store has something wrong with it: see above")),
        several => {
            Err(Error::new(ErrorKind::Corrupt, format!("the store has {several} things wrong with it: see above")))
        }
    }
}

fn check_lines(checked: &Checked) -> Vec<String> {
    let mut lines = Vec::new();
    for finding in &checked.findings {
        let kind = match finding.kind {
            FindingKind::Damage => "damage",
            FindingKind::Leftover => "leftover",
            FindingKind::Alien => "stranger",
        };
        lines.push(format!("{kind}: {}", finding.what));
        lines.push(format!("    so: {}", finding.consequence));
        if !finding.needed_by.is_empty() {
            lines.push(format!("    needed by: {}", finding.needed_by.join(", ")));
        }
        lines.push(format!("    do: {}", finding.remedy));
    }
    let Checked { layers, images, containers, snapshots, mounts, digests, .. } = checked;
    let read = digests.map_or(String::new(), |read| format!("; layers read and compared with their digests: {read}"));
    lines.push(format!(
        "looked at: layers {layers}, images {images}, containers {containers}, snapshots {snapshots}, mounts {mounts}{read}"
    ));
    lines
}

pub(crate) fn events(engine: &Engine, out: &Output, args: &EventsArgs) -> Result<()> {
    let time = |text: &Option<String>| text.as_deref().map(times::parse).transpose();
    let mut filter = EventFilter { since: time(&args.since)?, until: time(&args.until)?, ..EventFilter::default() };
    if filter.since > filter.until && filter.until.is_some() {
        return Err(Error::new(ErrorKind::InvalidInput, "--since is later than --until"));
    }
    args.filter.iter().try_for_each(|text| filter.add(text))?;
    engine.events(&filter, args.follow, &mut |event| {
        if out.is_json() {
            return output::line(serde_json::to_string(event).expect("our own types serialise"));
        }
        let attributes: Vec<_> = event
            .attributes
            .iter()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        let attributes = if attributes.is_empty() { String::new() } else { format!(" ({})", attributes.join(", ")) };
        let time = times::stamp(event.time);
        output::line(format_args!("{time} {} {} {}{attributes}", event.kind, event.action, event.actor))
    })
}
