//! Image archives: what `docker save`, `podman save`, `skopeo`, `buildah` and `ctr images export` write.
//!
//! Read are: a docker archive (`manifest.json`, with layers in directories or in `blobs/`), an OCI archive (the tar of an
//! OCI layout), an OCI layout directory; tars may be compressed as a whole with gzip or zstd, layers too. Where an archive
//! is both, as current Docker's are, the images of both are taken together.
//!
//! An image's names are `RepoTags`, else the annotation `io.containerd.image.name`, else
//! `org.opencontainers.image.ref.name`. The last may be a mere tag: the image is then named `localhost/TAG:latest`, as
//! `podman load` does.

mod docker;
mod files;
mod oci;
mod pipeline;
mod stream;
mod write;

pub use pipeline::pipelined;
pub use stream::{Compression, HashReader, LayerStream};
pub use write::{Format, SavedImage, write_archive};

use crate::{
    image::{ImageConfig, Reference},
    progress::{Cancel, Interruptible},
};
use files::{Blob, Files};
use graphdriver_core::{Context, DiffId, Digest, Error, ErrorKind, Result, Root};
use std::{io::Read, path::Path, sync::Arc};

/// What `stream` holds, decompressed if its first bytes are gzip's or zstd's.
///
/// # Errors
/// `Unsupported` for another compression.
pub fn decompressed(mut stream: impl Read) -> Result<impl Read> {
    let mut head = Vec::new();
    stream.by_ref().take(512).read_to_end(&mut head)?;
    let compression = files::sniff(&head)?;
    Ok(stream::Decoder::new(std::io::Cursor::new(head).chain(stream), compression)?)
}

/// The largest manifest or index read, in bytes.
const MAX_JSON: u64 = 8 << 20;

const ACCEPTED: &str = "accepted are what docker save and podman save write, OCI archives and OCI layout directories";

/// An image archive, open. Layers are read in place, any number of them at a time.
pub struct Archive(Arc<Files>);

/// One image of an archive. Its manifest and its configuration have been verified; its layers have not yet been read.
#[derive(Debug)]
pub struct ArchivedImage {
    /// Its configuration.
    pub config: ImageConfig,
    /// Its layers, bottom first: as many as the configuration has DiffIDs.
    pub layers: Vec<ArchivedLayer>,
    /// The names it was saved under.
    pub names: Vec<Reference>,
    /// The digest of its manifest, if the archive has one that registries know it by.
    pub manifest_digest: Option<Digest>,
}

/// One layer of an archived image.
#[derive(Clone)]
pub struct ArchivedLayer {
    /// Where it is in the archive.
    pub name: String,
    /// What its uncompressed tar must hash to; whoever reads it must check.
    pub diff_id: DiffId,
    /// What its stored bytes must hash to, if the archive says so; [`LayerStream`] checks it.
    pub digest: Option<Digest>,
    /// Its stored size in bytes.
    pub size: u64,
    /// How it is stored.
    pub compression: Compression,
    files: Arc<Files>,
}

impl std::fmt::Debug for ArchivedLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ArchivedLayer({} {:?} {} bytes)", self.name, self.compression, self.size)
    }
}

impl Archive {
    /// Opens the archive at `path`, a file or a directory. A compressed archive is decompressed into a file without a
    /// name in `tmp_dir`; any other is read where it is.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged or cut short, `InvalidInput` if it is something else, `Interrupted` once `cancel` is
    /// set.
    pub fn open(path: &Path, tmp_dir: &Path, cancel: &Cancel) -> Result<Archive> {
        let open = || {
            let file = Interruptible::open(path, cancel)?;
            if file.file().metadata()?.is_dir() {
                return Ok(Archive(Arc::new(Files::Dir(Root::from_fd(file.into_file().into())))));
            }
            Archive::from_file(file, tmp_dir)
        };
        open().doing(|| format!("opening the image archive {}", path.display()))
    }

    /// Opens an archive that is a descriptor already, standard input for example. A regular file is read in place; what
    /// else it may be, a pipe say, is first copied into a file without a name in `tmp_dir`.
    pub fn from_file(file: Interruptible, tmp_dir: &Path) -> Result<Archive> {
        Ok(Archive(Arc::new(Files::open_tar(file, tmp_dir)?)))
    }

    /// The images in it. Of an image for several platforms it is the one for this host, or the only one there.
    ///
    /// # Errors
    /// `Corrupt` if anything in it does not have the digest, size or form it should, `InvalidInput` if it is no image
    /// archive, `Unsupported` if none of an image's platforms is this host's.
    pub fn images(&self) -> Result<Vec<ArchivedImage>> {
        let mut images = Vec::new();
        let (oci, docker) = (self.0.open("index.json")?.is_some(), self.0.open("manifest.json")?.is_some());
        if !oci && !docker {
            return Err(self.no_image_archive()?);
        }
        if oci {
            oci::images(&self.0, &mut images).doing(|| "reading the images of index.json")?;
        }
        if docker {
            docker::images(&self.0, &mut images).doing(|| "reading the images of manifest.json")?;
        }
        if images.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "the archive holds no image").hint(ACCEPTED));
        }
        Ok(images)
    }

    fn no_image_archive(&self) -> Result<Error> {
        let top = self.0.top()?;
        let found = match top.len() {
            0 => ": it is empty".to_owned(),
            n => {
                let some: Vec<&str> = top.iter().take(5).map(String::as_str).collect();
                ", only ".to_owned() + &some.join(", ") + if n > some.len() { ", …" } else { "" }
            }
        };
        if self.0.lacks_end() {
            let why = format!("it has neither manifest.json nor index.json{found}, and no end marker");
            let e = Error::new(ErrorKind::Corrupt, format!("the archive is probably cut short: {why}"));
            return Ok(e.hint("copy or download the archive again"));
        }
        let e = Error::new(
            ErrorKind::InvalidInput,
            format!("this is no image archive: it has neither manifest.json nor index.json at its top{found}"),
        );
        let rootfs = ["etc", "usr", "bin", "sbin"].iter().filter(|d| top.contains(**d)).count() >= 2;
        Ok(match (rootfs, top.contains("repositories")) {
            (true, _) => e.hint("it looks like a root filesystem: make an image of it with `graphdriver import`"),
            (_, true) => e.hint("it may come from Docker before 1.10: load it into a newer Docker and save it again"),
            _ => e.hint(ACCEPTED),
        })
    }
}

impl ArchivedLayer {
    /// The layer's uncompressed tar, verified while it is read.
    pub fn open(&self) -> Result<LayerStream> {
        let blob = self.files.need(&self.name)?;
        LayerStream::new(self.name.clone(), Box::new(blob), self.size, self.digest, self.compression)
    }

    fn new(files: &Arc<Files>, name: &str, diff_id: DiffId, declared: Option<(Digest, u64)>) -> Result<ArchivedLayer> {
        let step = || format!("looking at layer {name} of the archive");
        let mut blob = files.need(name)?;
        let size = blob.len();
        if let Some((_, declared)) = declared.filter(|(_, declared)| *declared != size) {
            let why = format!("it has {size} bytes, and {declared} are declared");
            return Err(Error::new(ErrorKind::Corrupt, why).doing(step()));
        }
        let compression = layer_compression(&mut blob).doing(step)?;
        let digest = declared.map(|(digest, _)| digest).or_else(|| digest_in_name(name));
        Ok(ArchivedLayer { name: name.to_owned(), diff_id, digest, size, compression, files: files.clone() })
    }
}

/// Media types say less than the bytes do: archives exist whose gzip layers are called plain, and the reverse.
fn layer_compression(blob: &mut Blob) -> Result<Compression> {
    let mut block = [0; 512];
    let (mut len, size) = (0, blob.len());
    while len < block.len() {
        match blob.read(&mut block[len..])? {
            0 => break,
            n => len += n,
        }
    }
    let refuse = |what: &str| {
        let e = Error::new(ErrorKind::Unsupported, format!("it is {what}; layers may be tar, gzip or zstd"));
        Err(e.hint("save the image again with another compression"))
    };
    match Compression::sniff(&block[..len]) {
        Err(name) => refuse(&format!("compressed with {name}")),
        Ok(Compression::None) if size > 0 && !files::is_header(&block) && block != [0; 512] => {
            refuse("neither a tar nor compressed in a known way (encrypted, or no layer of files?)")
        }
        Ok(compression) => Ok(compression),
    }
}

/// The digest that the name of a blob in an OCI layout promises.
fn digest_in_name(name: &str) -> Option<Digest> {
    format!("sha256:{}", name.strip_prefix("blobs/sha256/")?).parse().ok()
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn verify(bytes: &[u8], declared: Digest, what: &str) -> Result<()> {
    let found = Digest::of(bytes);
    if found == declared {
        return Ok(());
    }
    let why = format!("its content has the digest {found}, and {declared} is declared");
    Err(Error::new(ErrorKind::Corrupt, why).doing(format!("verifying {what}")))
}

fn parse<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()).doing(format!("parsing {what}")))
}

fn check_layers(config: &ImageConfig, found: usize) -> Result<()> {
    let wanted = config.diff_ids().len();
    if found == wanted {
        return Ok(());
    }
    let why = format!("the manifest lists {found} layers, and the configuration {wanted}");
    Err(Error::new(ErrorKind::Corrupt, why).doing(format!("reading image {}", config.id())))
}

/// Adds an image, or its names to the same image that is there already.
fn add(images: &mut Vec<ArchivedImage>, new: ArchivedImage) {
    match images.iter_mut().find(|i| i.config.id() == new.config.id()) {
        Some(known) => {
            for name in new.names {
                if !known.names.contains(&name) {
                    known.names.push(name);
                }
            }
        }
        None => images.push(new),
    }
}

#[cfg(test)]
mod tests;
