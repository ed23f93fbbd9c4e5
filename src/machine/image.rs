//! What kind of image a file is, and whether its format is understood well enough to protect it.
//!
//! Any bytes can be replicated. Refused is only what would make the replica incomplete: guest data
//! in a file that the header names and that nobody follows (external data files, extents, parents
//! of formats other than qcow2).
//!
//! The probe believes the first bytes of the file. A guest can write any bytes into a raw disk,
//! so the names found here must only ever be opened below the mount (see `machine::chain`), and
//! a format that is declared elsewhere (the backing format of an overlay) goes before the probe.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::base::error::Context;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result};
use crate::format::qcow2::{HEADER_BYTES_MIN, Qcow2Header};

/// Bytes that the probe looks at from the beginning of a file.
const PROBE_BYTES: usize = 4096;
/// Where an ISO 9660 volume descriptor has its mark, in bytes.
const ISO_MARK_OFFSET: u64 = 0x8001;
/// Longest VMDK descriptor that is looked at, in bytes.
const VMDK_DESCRIPTOR_BYTES_MAX: usize = 64 << 10;

/// Format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// No known mark: the bytes are the disk.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
    /// qcow, version 1.
    Qcow,
    /// VMware.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Hyper-V.
    Vhdx,
    /// Virtual PC, Hyper-V before VHDX.
    Vpc,
    /// QEMU enhanced disk.
    Qed,
    /// LUKS-encrypted raw disk.
    Luks,
    /// A CD or DVD image: not a disk of a VM, skipped when a folder is protected.
    Iso,
}

impl ImageFormat {
    /// The name that QEMU knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Qed => "qed",
            Self::Luks => "luks",
            Self::Iso => "iso",
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Format of the file.
    pub format: ImageFormat,
    /// Size of the file, in bytes.
    pub file_size: u64,
    /// The header, for qcow2.
    pub qcow2: Option<Qcow2Header>,
    /// Guest data that lies elsewhere and that nobody follows; in words.
    outside: Option<String>,
}

impl ImageInfo {
    /// A raw image, whatever its first bytes look like.
    pub fn raw(file_size: u64) -> Self {
        Self { format: ImageFormat::Raw, file_size, qcow2: None, outside: None }
    }

    /// Name of the backing file, as the header has it.
    pub fn backing(&self) -> Option<&str> {
        self.qcow2.as_ref()?.backing.as_deref()
    }

    /// Format of the backing file, if the header names it.
    pub fn backing_format(&self) -> Option<&str> {
        self.qcow2.as_ref()?.backing_format.as_deref()
    }

    /// Size of the disk that the guest sees, in bytes, where it is known (raw, qcow2).
    pub fn virtual_size(&self) -> Option<u64> {
        match (&self.qcow2, self.format) {
            (Some(header), _) => Some(header.virtual_size),
            (None, ImageFormat::Raw) => Some(self.file_size),
            _ => None,
        }
    }

    /// Refuses an image whose replica would be incomplete. `path` is for the message.
    pub fn verify_supported(&self, path: &std::path::Path) -> Result<()> {
        let Some(outside) = &self.outside else { return Ok(()) };
        Err(Error::new(ErrorKind::Refused, format!("disk {} cannot be protected", path.display()))
            .why(format!("it is a {} image with {outside}; its replica would be incomplete", self.format))
            .hint(format!("qemu-img convert -O qcow2 {0} {0}.qcow2", shell(path))))
    }
}

/// Looks at an image file. Errors: the file's, and [`ErrorKind::Damaged`] for a header that
/// cannot be one.
pub fn probe(file: &File) -> Result<ImageInfo> {
    let what = || "the image cannot be read";
    let file_size = file.metadata().context(what)?.len();
    let start = read_up_to(file, 0, PROBE_BYTES).context(what)?;
    let mut info = ImageInfo { format: format_of(&start), ..ImageInfo::raw(file_size) };
    match info.format {
        ImageFormat::Raw => {
            if read_up_to(file, ISO_MARK_OFFSET, 5).context(what)? == b"CD001" {
                info.format = ImageFormat::Iso;
            } else if read_up_to(file, file_size.saturating_sub(512), 8).context(what)? == b"conectix" {
                info.format = ImageFormat::Vpc;
            }
        }
        ImageFormat::Qcow2 => {
            let header = read_qcow2(|offset, length| read_up_to(file, offset, length).context(what))?;
            if header.has_data_file() {
                let name = header.data_file.as_deref().unwrap_or("a name that the header does not tell");
                info.outside = Some(format!("its data in another file ({name})"));
            }
            info.qcow2 = Some(header);
        }
        _ => {}
    }
    if info.outside.is_none() {
        info.outside = outside_of(info.format, &start, |offset, length| read_up_to(file, offset, length))
            .context(what)?
            .map(str::to_owned);
    }
    Ok(info)
}

/// Reads a qcow2 header through `read(offset, length)`, which may return fewer bytes at the end.
pub fn read_qcow2(read: impl Fn(u64, usize) -> Result<Vec<u8>>) -> Result<Qcow2Header> {
    let start = read(0, HEADER_BYTES_MIN)?;
    Qcow2Header::decode(&read(0, Qcow2Header::bytes_needed(&start)?)?)
}

fn format_of(start: &[u8]) -> ImageFormat {
    let begins = |mark: &[u8]| start.starts_with(mark);
    let at = |offset: usize, mark: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(mark));
    if begins(b"QFI\xfb") {
        if at(4, &[0, 0, 0, 1]) { ImageFormat::Qcow } else { ImageFormat::Qcow2 }
    } else if begins(b"KDMV") || begins(b"COWD") || begins(b"# Disk DescriptorFile") {
        ImageFormat::Vmdk
    } else if at(0x40, &[0x7f, 0x10, 0xda, 0xbe]) {
        ImageFormat::Vdi
    } else if begins(b"vhdxfile") {
        ImageFormat::Vhdx
    } else if begins(b"conectix") {
        ImageFormat::Vpc
    } else if begins(b"QED\0") {
        ImageFormat::Qed
    } else if begins(b"LUKS\xba\xbe") {
        ImageFormat::Luks
    } else {
        ImageFormat::Raw
    }
}

/// Data outside the file, for formats other than qcow2. A VHDX with a parent is not found: QEMU
/// cannot run one.
fn outside_of(
    format: ImageFormat,
    start: &[u8],
    read: impl Fn(u64, usize) -> std::io::Result<Vec<u8>>,
) -> std::io::Result<Option<&'static str>> {
    let byte = |offset: usize| start.get(offset).copied().unwrap_or(0);
    Ok(match format {
        ImageFormat::Qcow if start.get(8..16).is_some_and(|b| b != [0; 8]) => Some("a backing file"),
        ImageFormat::Qed if byte(16) & 1 != 0 => Some("a backing file"),
        ImageFormat::Vdi if matches!(byte(0x4c), 3 | 4) => Some("a parent image"),
        ImageFormat::Vpc if byte(63) == 4 => Some("a parent image"),
        ImageFormat::Vmdk if start.starts_with(b"KDMV") => {
            let field = |offset: usize| {
                let bytes = start.get(offset..offset + 8).and_then(|b| b.try_into().ok());
                bytes.map_or(0, u64::from_le_bytes)
            };
            let length = usize::try_from(field(36).saturating_mul(512)).unwrap_or(usize::MAX);
            let length = length.min(VMDK_DESCRIPTOR_BYTES_MAX);
            vmdk_outside(&read(field(28).saturating_mul(512), length)?)
        }
        ImageFormat::Vmdk if start.starts_with(b"COWD") => Some("extents or a parent of an old kind"),
        ImageFormat::Vmdk => Some("its data in other files (extents)"),
        _ => None,
    })
}

fn vmdk_outside(descriptor: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(descriptor).to_ascii_lowercase();
    let value = |key: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
        })
    };
    if value("parentcid").is_some_and(|cid| cid != "ffffffff") {
        return Some("a parent image");
    }
    match value("createtype").as_deref() {
        None | Some("monolithicsparse" | "streamoptimized") => None,
        Some(_) => Some("its data in other files (extents)"),
    }
}

/// Up to `length` bytes at `offset`; fewer at the end of the file.
fn read_up_to(file: &File, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; length];
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(filled as u64);
        if i64::try_from(at).is_err() {
            break;
        }
        match file.read_at(rest, at) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn image(bytes: &[u8]) -> ImageInfo {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        probe(&file).unwrap()
    }

    #[test]
    fn knows_formats_by_their_marks() {
        let mut iso = vec![0; 0x9000];
        iso[0x8001..0x8006].copy_from_slice(b"CD001");
        assert_eq!(image(&iso).format, ImageFormat::Iso);
        assert_eq!(image(&[]).format, ImageFormat::Raw);
        assert_eq!(image(&[1; 100]).virtual_size(), Some(100));
        assert_eq!(image(b"LUKS\xba\xbe\0\x02").format, ImageFormat::Luks);
        let mut fixed = vec![0; 2048];
        fixed[1536..1544].copy_from_slice(b"conectix");
        assert_eq!(image(&fixed).format, ImageFormat::Vpc);
    }

    #[test]
    fn knows_what_qemu_img_makes() {
        let dir = tempfile::tempdir().unwrap();
        for format in ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed"] {
            let path = dir.path().join(format);
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", format])
                .arg(&path)
                .arg("8M")
                .status()
                .unwrap();
            assert!(made.success());
            let info = probe(&File::open(&path).unwrap()).unwrap();
            assert_eq!(info.format.name(), format);
            info.verify_supported(&path).unwrap();
        }
    }

    #[test]
    fn refuses_data_outside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let make = |args: &[&str]| {
            let made = Command::new("qemu-img").arg("create").arg("-q").args(args).current_dir(&dir).status();
            assert!(made.unwrap().success(), "{args:?}");
        };
        make(&["-f", "raw", "base", "8M"]);
        make(&["-f", "qed", "-b", "base", "-F", "raw", "overlay.qed"]);
        make(&["-f", "qcow2", "-o", "data_file=data.raw", "outside.qcow2", "8M"]);
        make(&["-f", "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "8M"]);
        make(&["-f", "vmdk", "base.vmdk", "8M"]);
        make(&["-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "overlay.vmdk"]);
        for name in ["overlay.qed", "outside.qcow2", "flat.vmdk", "overlay.vmdk"] {
            let path = dir.path().join(name);
            let refused = probe(&File::open(&path).unwrap()).unwrap().verify_supported(&path).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Refused, "{name}");
            assert!(refused.next_step().unwrap().starts_with("qemu-img convert"), "{name}");
        }
        assert!(
            probe(&File::open(dir.path().join("base.vmdk")).unwrap())
                .unwrap()
                .verify_supported(dir.path())
                .is_ok()
        );
    }
}
