//! The maps of sparse files in tars (GNU tar manual, "Storing Sparse Files").

use super::{
    Segment,
    header::{MAX_SEGMENTS, corrupt, decimal, number, size},
};
use crate::Result;

/// The segments a map names, without its empty ones, checked: sorted, apart, within a file of `real_size`, and `stored`
/// bytes in all.
pub(super) fn checked(map: impl IntoIterator<Item = Segment>, real_size: u64, stored: u64) -> Result<Vec<Segment>> {
    let (mut segments, mut end, mut sum) = (Vec::new(), 0u64, 0u64);
    for segment in map {
        if segment.len == 0 {
            continue;
        }
        let segment_end = segment.offset.checked_add(segment.len).filter(|e| *e <= real_size);
        if segment.offset < end || segment_end.is_none() {
            return Err(corrupt("its sparse map is out of order or leads beyond the file's end"));
        }
        end = segment_end.unwrap_or(end);
        sum += segment.len;
        segments.push(segment);
        if segments.len() > MAX_SEGMENTS {
            return Err(corrupt(format!("its sparse map has more than {MAX_SEGMENTS} segments")));
        }
    }
    if sum != stored {
        return Err(corrupt(format!("its sparse map names {sum} bytes where {stored} are stored")));
    }
    Ok(segments)
}

/// Offsets and lengths in turn, as PAX sparse maps are written.
pub(super) fn pairs(numbers: &[u64]) -> Result<Vec<Segment>> {
    if !numbers.len().is_multiple_of(2) {
        return Err(corrupt("its sparse map has an offset without a length"));
    }
    Ok(numbers.chunks(2).map(|pair| Segment { offset: pair[0], len: pair[1] }).collect())
}

/// The descriptors in an old GNU sparse header or in one of its extension blocks; an empty one ends them.
pub(super) fn old_gnu(descriptors: &[tar::GnuSparseHeader], into: &mut Vec<Segment>) -> Result<()> {
    for descriptor in descriptors.iter().take_while(|d| d.offset[0] != 0 || d.numbytes[0] != 0) {
        let offset = size(number(&descriptor.offset, "sparse map")?, "sparse map")?;
        let len = size(number(&descriptor.numbytes, "sparse map")?, "sparse map")?;
        into.push(Segment { offset, len });
    }
    if into.len() > MAX_SEGMENTS {
        return Err(corrupt(format!("its sparse map has more than {MAX_SEGMENTS} segments")));
    }
    Ok(())
}

/// The map of format 1.0, which lies before the data: decimal numbers, one a line, the count first, padded to a block.
/// `block` gives the next block of the entry.
pub(super) fn pax_1_0(mut block: impl FnMut() -> Result<[u8; 512]>) -> Result<Vec<Segment>> {
    let (mut numbers, mut wanted, mut line) = (Vec::new(), 1, Vec::new());
    while numbers.len() < wanted {
        for byte in block()? {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > 20 {
                    return Err(corrupt("its sparse map has a number of more than 20 digits"));
                }
                continue;
            }
            numbers.push(decimal(&line).ok_or_else(|| corrupt("its sparse map has something that is no number"))?);
            line.clear();
            if numbers[0] > MAX_SEGMENTS as u64 {
                return Err(corrupt(format!("its sparse map has more than {MAX_SEGMENTS} segments")));
            }
            wanted = 1 + 2 * numbers[0] as usize;
            if numbers.len() == wanted {
                break;
            }
        }
    }
    pairs(&numbers[1..])
}
