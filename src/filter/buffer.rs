//! Page-aligned buffers for O_DIRECT: one per thread, made once, reused for every request.

use std::cell::RefCell;

use nix::errno::Errno;

const PAGE: usize = 4096;
/// Larger requests do not exist (fuser's largest is 16 MiB).
const BYTES_MAX: usize = 16 << 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with an aligned buffer of `length` bytes, of whatever content.
/// EINVAL: longer than any request.
pub(super) fn with_aligned<R>(length: usize, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, Errno> {
    if length > BYTES_MAX {
        return Err(Errno::EINVAL);
    }
    BUFFER.with(|cell| {
        // Taken while in use; only a nested call would find it gone, and makes its own.
        let mut bytes = cell.take();
        let need = length.next_power_of_two().max(PAGE) + PAGE;
        if bytes.len() < need {
            bytes = vec![0; need];
        }
        let start = bytes.as_ptr().align_offset(PAGE);
        let result = match bytes.get_mut(start..start.saturating_add(length)) {
            Some(buffer) => Ok(f(buffer)),
            None => Err(Errno::EINVAL),
        };
        cell.replace(bytes);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_reused() {
        let first = with_aligned(100, |b| (b.as_ptr() as usize, b.len())).unwrap();
        let second = with_aligned(4096, |b| (b.as_ptr() as usize, b.len())).unwrap();
        assert_eq!(first.0 % PAGE, 0);
        assert_eq!((first.0, first.1, second.1), (second.0, 100, 4096));
        assert_eq!(with_aligned(BYTES_MAX + 1, |_| ()), Err(Errno::EINVAL));
    }
}
