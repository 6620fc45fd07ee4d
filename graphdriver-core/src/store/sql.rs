//! How identifiers and units are written in tables, the caller's too: numbers as INTEGER, digests as TEXT.

use crate::{ByteSize, ChainId, DiffId, Digest, LayerId};
use rusqlite::{
    Result, ToSql,
    types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef},
};

macro_rules! as_integer {
    ($name:ident) => {
        impl ToSql for $name {
            fn to_sql(&self) -> Result<ToSqlOutput<'_>> {
                // SQLite's integers are signed. No number given by a store and no real size is beyond.
                Ok(i64::try_from(self.0).unwrap_or(i64::MAX).into())
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                let number = value.as_i64()?;
                u64::try_from(number).map($name).map_err(|_| FromSqlError::OutOfRange(number))
            }
        }
    };
}

macro_rules! as_text {
    ($name:ident) => {
        impl ToSql for $name {
            fn to_sql(&self) -> Result<ToSqlOutput<'_>> {
                Ok(self.to_string().into())
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                value.as_str()?.parse().map_err(FromSqlError::other)
            }
        }
    };
}

as_integer!(LayerId);
as_integer!(ByteSize);
as_text!(Digest);
as_text!(DiffId);
as_text!(ChainId);
