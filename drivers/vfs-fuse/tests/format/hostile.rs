//! Marks that somebody has made up or damaged.

use crate::{
    HEADER, MIB, REDIRECT,
    common::Layers,
    disk::{bash, filled, sh, snapshot},
    incomplete, ours, pattern, to_version_1,
};
use rustix::io::Errno;
use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Whatever the xattrs say, nothing but the layers is read.
#[test]
fn redirects_lead_nowhere_outside_the_layers() {
    needs!("redirects_lead_nowhere_outside_the_layers");
    const SENTINEL: &str = "outside the layers";
    let layers = Layers::new(2);
    let outside = layers.dir().join("outside");
    fs::create_dir_all(outside.join("sub")).unwrap();
    fs::write(outside.join("sub/sentinel"), SENTINEL).unwrap();
    fs::write(outside.join("sentinel"), SENTINEL).unwrap();
    sh(&layers.lowers[1], "mkdir -p real/sub; echo 1 > real/f; echo 1 > real/sub/f");
    symlink(&outside, layers.lowers[1].join("link")).unwrap();
    symlink("../outside", layers.lowers[1].join("up")).unwrap();
    let absolute = outside.to_str().unwrap().to_owned();
    let long = format!("/{}", "long/".repeat(800));
    let values: Vec<&[u8]> = vec![
        b"..",
        b"../outside",
        b"/..",
        b"/../outside",
        b"/../../../../../../../../etc",
        b"/real/../../outside",
        b"real/../..",
        b"/",
        b"//",
        b"/.",
        b".",
        b"",
        b"/real/",
        b"/real//sub",
        b"/real/./sub",
        b"/link",
        b"/link/sub",
        b"/up",
        b"/up/sub",
        b"link",
        b"/real/f",
        b"/nowhere",
        b"nowhere",
        b"/real\0/sub",
        b"\0",
        b"/\xff\xfe",
        b"/a/b/c/d/e/f/g",
        b"real/sub",
        absolute.as_bytes(),
        long.as_bytes(),
        b"/loop-b",
        b"/loop-a",
        b"/self",
        b"self",
        b"../real",
        b"\n",
        b"/real\n",
    ];
    let names: Vec<String> = (0..values.len())
        .map(|n| match values[n] {
            b"/loop-b" => "loop-a".into(),
            b"/loop-a" => "loop-b".into(),
            b"/self" => "self".into(),
            _ => format!("r{n:02}"),
        })
        .collect();
    for layer in [&layers.lowers[0], &layers.upper] {
        for (name, value) in names.iter().zip(&values) {
            let dir = layer.join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("own"), "own").unwrap();
            xattr::set(&dir, REDIRECT, value).unwrap();
            // A metacopy file that says its data is there.
            let file = layer.join(format!("file-{name}"));
            fs::File::create(&file).unwrap().set_len(18).unwrap();
            xattr::set(&file, "trusted.overlay.metacopy", b"").unwrap();
            xattr::set(&file, REDIRECT, [value, &b"/sentinel"[..]].concat().as_slice()).unwrap();
        }
    }
    let mounted = ours(&layers);
    let mut clear = Vec::new();
    for name in &names {
        walk_hostile(&mounted.path().join(name), SENTINEL, 12, &mut clear);
        walk_hostile(&mounted.path().join(format!("file-{name}")), SENTINEL, 12, &mut clear);
        // Changes go no other way than reads.
        let _ = fs::write(mounted.path().join(name).join("made"), "made");
        let _ = fs::remove_file(mounted.path().join(name).join("sentinel"));
        let _ = fs::remove_file(mounted.path().join(name).join("sub/sentinel"));
    }
    let known = [
        Errno::IO,
        Errno::STALE,
        Errno::NOENT,
        Errno::LOOP,
        Errno::INVAL,
        Errno::PERM,
        Errno::NOTDIR,
        Errno::NAMETOOLONG,
    ];
    for (path, errno) in &clear {
        assert!(known.iter().any(|e| e.raw_os_error() == *errno), "{} gives errno {errno}", path.display());
    }
    assert_eq!(fs::read_to_string(mounted.path().join("real/f")).unwrap(), "1\n", "it still serves");
    mounted.unmount();
    assert_eq!(
        sh(&outside, "find . | sort | tr '\\n' ' '; cat sentinel sub/sentinel"),
        format!(". ./sentinel ./sub ./sub/sentinel {SENTINEL}{SENTINEL}")
    );
}

/// Reads all it can below a path; the sentinel's content must not be there. Notes the errnos.
fn walk_hostile(path: &Path, sentinel: &str, depth: usize, errors: &mut Vec<(PathBuf, i32)>) {
    assert!(depth > 0, "{} goes round in circles", path.display());
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let meta = fs::symlink_metadata(path)?;
        if meta.is_file() {
            assert_ne!(fs::read(path)?, sentinel.as_bytes(), "{} is outside", path.display());
        }
        if meta.is_dir() { fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect() } else { Ok(Vec::new()) }
    };
    match read() {
        Err(e) => errors.push((path.to_owned(), e.raw_os_error().unwrap())),
        Ok(entries) => entries.iter().for_each(|entry| walk_hostile(entry, sentinel, depth - 1, errors)),
    }
}

/// The xattrs we keep for ourselves, damaged: an error or the right bytes, never those of another file, and no crash.
#[test]
fn damaged_headers_are_refused() {
    needs!("damaged_headers_are_refused");
    damaged(HEADER, |_| ());
}

#[test]
fn damaged_headers_of_version_1_are_refused() {
    needs!("damaged_headers_of_version_1_are_refused");
    damaged("trusted.overlay.vfs.extent", to_version_1);
}

fn damaged(header: &str, prepare: impl Fn(&Path)) {
    let (layers, expected) = incomplete();
    let secret = layers.dir().join("secret");
    fs::write(&secret, vec![b's'; MIB]).unwrap();
    let file = layers.upper.join("dir/big");
    prepare(&file);
    let genuine = xattr::get(&file, header).unwrap().expect("FORMAT.md names it");
    let mut damaged: Vec<Vec<u8>> = (0..genuine.len()).map(|n| genuine[..n].to_vec()).collect();
    damaged.push([&genuine[..], b"more"].concat());
    damaged.push(vec![0xff; genuine.len()]);
    damaged.push(vec![0; genuine.len()]);
    damaged.push(b"garbage".to_vec());
    for n in 0..genuine.len() {
        damaged.push(genuine.iter().enumerate().map(|(at, byte)| if at == n { byte ^ 0x81 } else { *byte }).collect());
    }
    let path = b"dir/big";
    let at = genuine.windows(path.len()).position(|w| w == path).expect("it holds the lower file's path");
    for instead in
        [&b"../../s"[..], b"/secret", b"dir/../", b"dir//ig", b"dir/\0ig", b"/ir/big", b"../dir/", b"dir/met"]
    {
        let mut changed = genuine.clone();
        changed[at..at + path.len()].copy_from_slice(instead);
        damaged.push(changed);
    }
    let original = fs::read(&file).unwrap();
    for (n, value) in damaged.iter().enumerate() {
        xattr::set(&file, header, value).unwrap();
        let mounted = ours(&layers);
        match fs::read(mounted.path().join("dir/big")) {
            Ok(content) => assert!(content == expected, "damage {n} ({value:02x?}) shows something else"),
            Err(e) => assert!(matches!(e.raw_os_error(), Some(5 | 1 | 95 | 116)), "damage {n}: {e}"),
        }
        assert!(fs::read(mounted.path().join("dir/meta")).unwrap() == pattern(MIB), "damage {n}: it still serves");
        mounted.unmount();
        assert!(fs::read(&file).unwrap() == original, "damage {n}: reading has changed the file");
    }
    xattr::set(&file, header, &genuine).unwrap();
    assert!(fs::read(ours(&layers).path().join("dir/big")).unwrap() == expected, "the genuine one is taken");
}

/// Inode numbers that were remembered may be garbage too.
#[test]
fn damaged_inode_numbers_do_no_harm() {
    needs!("damaged_inode_numbers_do_no_harm");
    let layers = filled();
    let mounted = ours(&layers);
    sh(mounted.path(), "echo more >> a/f; echo more >> a/b/f; chmod 700 stay; echo x > new");
    mounted.unmount();
    let values: [&[u8]; 8] = [
        b"",
        b"1",
        &[0; 8],
        &[0xff; 8],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0; 9],
        &[0xff; 100],
        &[0, 0, 0, 0, 0, 0, 0, 0x80],
    ];
    for value in values {
        for path in ["a", "a/f", "a/b/f", "stay", "new", ""] {
            xattr::set(layers.upper.join(path), "trusted.overlay.vfs.ino", value).unwrap();
        }
        let mounted = ours(&layers);
        let look =
            bash(mounted.path(), "cat a/f; find . > /dev/null; stat -c %i a a/f a/b/f stay new > /dev/null; cat new");
        let (content, said) = (String::from_utf8_lossy(&look.stdout), String::from_utf8_lossy(&look.stderr));
        assert_eq!(content, "bottom a/f\nmore\nx\n", "all have the number {value:02x?}: {said}");
        sh(mounted.path(), "echo y > new; mv new new2; mv new2 new; echo x > new");
        let unlike = snapshot(mounted.path());
        // Two files that say they are one are still two.
        assert_ne!(unlike[Path::new("a/f")].content, unlike[Path::new("a/b/f")].content);
        mounted.unmount();
    }
    assert_eq!(fs::read(layers.upper.join("no")).unwrap_err().kind(), ErrorKind::NotFound);
}
