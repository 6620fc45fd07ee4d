//! One error type for every part: a meaning, what was being done, to what, why it failed, what to do next.

use std::fmt;

/// What an error means. Every front end (exit code, gRPC status, errno) translates from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The named thing does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Somebody uses it; it can be tried again when they are done.
    Busy,
    /// The request itself is wrong: a bad name, option, path or combination.
    InvalidInput,
    /// This host, kernel, filesystem or driver cannot do it.
    Unsupported,
    /// The caller lacks a privilege.
    PermissionDenied,
    /// A limit set on the layer was reached.
    QuotaExceeded,
    /// The filesystem or pool is full.
    OutOfSpace,
    /// Data is not what it should be: a wrong digest, a truncated or hostile archive, a damaged store.
    Corrupt,
    /// The user asked to stop.
    Interrupted,
    /// Any other failure of the operating system.
    Io,
}

/// The result of every fallible call here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its meaning and its story.
///
/// [`Display`](fmt::Display) prints one line: what was being done, from the outermost to the innermost step, why it
/// failed, and what the user can do.
///
/// ```
/// use graphdriver_core::{Error, ErrorKind};
/// let e = Error::new(ErrorKind::NotFound, "no such file")
///     .doing("opening entry \"etc/passwd\"")
///     .doing("loading layer 7")
///     .hint("check the archive");
/// assert_eq!(e.to_string(), "loading layer 7: opening entry \"etc/passwd\": no such file (check the archive)");
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    reason: String,
    /// Innermost first.
    steps: Vec<String>,
    hint: Option<String>,
}

impl Error {
    /// An error that means `kind`, because of `reason`.
    pub fn new(kind: ErrorKind, reason: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, reason: reason.into(), steps: Vec::new(), hint: None }))
    }

    /// Its meaning.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The innermost reason, without steps and hint.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// What the user can do about it, if somebody knew.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Adds the step during which it happened: `doing("mounting layer 3")`. Outer callers add outer steps.
    #[must_use]
    pub fn doing(mut self, step: impl Into<String>) -> Self {
        self.0.steps.push(step.into());
        self
    }

    /// Adds what the user can do. The first hint given, nearest to the cause, stays.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same story with another meaning, where the caller knows better what an errno stands for.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in self.0.steps.iter().rev() {
            write!(f, "{step}: ")?;
        }
        f.write_str(&self.0.reason)?;
        match &self.0.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// errno becomes meaning here and nowhere else.
impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        // An error of ours that travelled through a `Read` or `Write` comes out as it went in.
        if e.get_ref().is_some_and(|inner| inner.is::<Error>()) {
            let inner = e.into_inner().expect("checked by get_ref");
            return *inner.downcast::<Error>().expect("checked by is");
        }
        let kind = match e.raw_os_error() {
            Some(libc::EDQUOT) => ErrorKind::QuotaExceeded,
            Some(libc::ENOSPC) => ErrorKind::OutOfSpace,
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => ErrorKind::Unsupported,
            Some(libc::EXDEV | libc::ELOOP | libc::ENAMETOOLONG | libc::EINVAL | libc::ENOTDIR | libc::EISDIR) => {
                ErrorKind::InvalidInput
            }
            Some(libc::EUCLEAN | libc::EBADMSG) => ErrorKind::Corrupt,
            Some(libc::ENOTEMPTY) => ErrorKind::Busy,
            _ => match e.kind() {
                K::NotFound => ErrorKind::NotFound,
                K::AlreadyExists => ErrorKind::AlreadyExists,
                K::PermissionDenied => ErrorKind::PermissionDenied,
                K::ResourceBusy => ErrorKind::Busy,
                // Without an errno where a library has wrapped it.
                K::StorageFull => ErrorKind::OutOfSpace,
                K::QuotaExceeded => ErrorKind::QuotaExceeded,
                K::UnexpectedEof => ErrorKind::Corrupt,
                K::InvalidData => ErrorKind::Corrupt,
                _ => ErrorKind::Io,
            },
        };
        let mut reason = e.to_string();
        // "No such file or directory (os error 2)": the number says nothing to a user.
        if let Some(cut) = reason.rfind(" (os error") {
            reason.truncate(cut);
        }
        Error::new(kind, reason)
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(e: rustix::io::Errno) -> Self {
        std::io::Error::from(e).into()
    }
}

impl From<rusqlite::Error> for Error {
    fn from(e: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode as C;
        let kind = match e.sqlite_error_code() {
            Some(C::DiskFull) => ErrorKind::OutOfSpace,
            Some(C::DatabaseBusy | C::DatabaseLocked) => ErrorKind::Busy,
            Some(C::DatabaseCorrupt | C::NotADatabase) => ErrorKind::Corrupt,
            Some(C::ConstraintViolation) if is_unique(&e) => ErrorKind::AlreadyExists,
            Some(C::PermissionDenied | C::ReadOnly) => ErrorKind::PermissionDenied,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("the store's database: {e}"))
    }
}

fn is_unique(e: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE};
    let code = e.sqlite_error().map(|e| e.extended_code);
    matches!(code, Some(SQLITE_CONSTRAINT_PRIMARYKEY | SQLITE_CONSTRAINT_UNIQUE))
}

/// An error of ours can travel through `std::io::{Read, Write}`; [`Error::from`] takes it out again.
impl From<Error> for std::io::Error {
    fn from(e: Error) -> Self {
        std::io::Error::other(e)
    }
}

/// Adds the step to whatever error comes out, turning errno into meaning on the way.
pub trait Context<T> {
    /// `file.read(..).doing(|| format!("reading {path}"))?`
    fn doing<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T>;
    /// Adds what the user can do about it.
    fn hint<S: Into<String>>(self, hint: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().doing(step()))
    }

    fn hint<S: Into<String>>(self, hint: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().hint(hint()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_becomes_meaning_and_loses_its_number() {
        let e = Error::from(rustix::io::Errno::NOSPC);
        assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::OutOfSpace, "No space left on device"));
        assert_eq!(Error::from(rustix::io::Errno::DQUOT).kind(), ErrorKind::QuotaExceeded);
        assert_eq!(Error::from(rustix::io::Errno::BUSY).kind(), ErrorKind::Busy);
    }

    #[test]
    fn survives_a_trip_through_io_error() {
        let there = std::io::Error::from(Error::new(ErrorKind::Corrupt, "bad digest").hint("load it again"));
        let back = Error::from(there);
        assert_eq!((back.kind(), back.to_string().as_str()), (ErrorKind::Corrupt, "bad digest (load it again)"));
    }
}
