//! Errors as containerd understands them.

use graphdriver_core::{Error, ErrorKind};
use tonic::{Code, Status};

pub(super) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::InvalidInput => Code::InvalidArgument,
        // Not UNIMPLEMENTED, by which containerd knows snapshotters without the call.
        ErrorKind::Busy | ErrorKind::Unsupported => Code::FailedPrecondition,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::QuotaExceeded | ErrorKind::OutOfSpace => Code::ResourceExhausted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Interrupted => Code::Cancelled,
        _ => Code::Internal,
    }
}

pub(super) fn status(e: &Error) -> Status {
    Status::new(code(e.kind()), e.to_string())
}
