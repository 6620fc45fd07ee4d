//! Mounting, and serving until the unmount.

use super::{
    filesystem::Vfs,
    mount::Place,
    wake::{Requests, Ticker},
};
use crate::{config::Config, options::MountOptions, union::Union};
use fuser::SessionACL;
use graphdriver_core::{Context, Result};
use std::{
    num::NonZero,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Weak},
    thread::available_parallelism,
};

/// Where requests come from.
#[derive(Debug)]
pub enum Target {
    /// A directory, to be mounted on.
    Path(PathBuf),
    /// `/dev/fuse`, mounted by somebody else.
    Device(OwnedFd),
}

/// A mounted union.
pub struct Session {
    session: fuser::Session<Vfs>,
    name: String,
    place: Option<Arc<Place>>,
    union: Arc<Union>,
    requests: Arc<Requests>,
}

/// Unmounts from any thread.
#[derive(Debug, Clone)]
pub struct Unmounter(Weak<Place>);

impl Unmounter {
    /// Unmounts, if it is still mounted and was mounted by us. EBUSY while a file is open or a directory in use; then
    /// it can be tried again.
    pub fn unmount(&self) -> std::io::Result<()> {
        self.0.upgrade().map_or(Ok(()), |place| place.unmount())
    }
}

impl Session {
    /// Mounts the union. The kernel's requests are answered from [`Session::run`] on.
    pub fn start(union: Arc<Union>, target: Target, options: &MountOptions) -> Result<Session> {
        let config = fuser_config(union.config(), options);
        let requests = Arc::default();
        let (vfs, notifier) = Vfs::new(union.clone(), Arc::clone(&requests));
        let (name, place, device) = match target {
            Target::Path(path) => {
                let name = format!("mounting on {}", path.display());
                let place = Place::mount(&path, options).doing(|| name.as_str())?;
                let device = place.device()?;
                (name, Some(Arc::new(place)), device)
            }
            Target::Device(device) => ("serving a given /dev/fuse".to_owned(), None, device),
        };
        let session = fuser::Session::from_fd(vfs, device, config.acl, config).doing(|| name.as_str())?;
        notifier.set(session.notifier()).expect("set here alone");
        Ok(Session { session, name, place, union, requests })
    }

    /// Serves until the unmount, and does meanwhile what the union does by itself.
    pub fn run(self) -> Result<()> {
        let Session { session, name, place, union, requests } = self;
        union.look_ahead();
        let _completer = union.start_completion();
        let _ticker = Ticker::start(union.config().wake_latency, &requests);
        let served = unless_aborted(session.run()).doing(|| format!("{name}: answering the kernel"));
        // Kept so long, that it can be unmounted.
        drop(place);
        served
    }

    /// For another thread to unmount with.
    pub fn unmounter(&self) -> Unmounter {
        Unmounter(self.place.as_ref().map_or_else(Weak::new, Arc::downgrade))
    }
}

fn fuser_config(config: &Config, options: &MountOptions) -> fuser::Config {
    let mut fuser = fuser::Config::default();
    fuser.n_threads = Some(threads(config));
    fuser.acl = match (options.allow_other, options.allow_root) {
        (true, _) => SessionACL::All,
        (false, true) => SessionACL::RootAndOwner,
        (false, false) => SessionACL::Owner,
    };
    fuser
}

/// The kernel wakes waiting threads in turn, so that more than CPUs are only woken with colder caches: opening small files
/// took 26 to 32 µs with four threads on two CPUs, 21 to 23 with two. What takes long has threads of its own.
fn threads(config: &Config) -> usize {
    config.threads.unwrap_or_else(|| available_parallelism().map_or(2, NonZero::get)).max(2)
}

/// An unmount may overtake a request on its way to us, as RELEASE and FORGET are not waited for. Then reading it gives
/// ECONNABORTED instead of the ENODEV that fuser takes for the end.
fn unless_aborted(served: std::io::Result<()>) -> std::io::Result<()> {
    served.or_else(|e| if e.raw_os_error() == Some(libc::ECONNABORTED) { Ok(()) } else { Err(e) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmount_with_requests_on_their_way_is_no_failure() {
        let ended_with = |errno| unless_aborted(Err(std::io::Error::from_raw_os_error(errno)));
        assert!(ended_with(libc::ECONNABORTED).is_ok());
        assert!(ended_with(libc::EIO).is_err());
    }
}
