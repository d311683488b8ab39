"""Pure: items to bytes of a file image, `.metadata` and manifest, and back; ours and stock's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazily
from .renamed_tree import renamed_paths, renamed_tree

if TYPE_CHECKING:
    from .archive_records import ArchiveRecords, ContentError, find_archive, records_of_archive
    from .archived_items import ArchivedItems, MadeFile
    from .base import LOOSE, FileLayout, Format, PublicFiles, PublicTensor, Runs
    from .distcp import (
        BLOCK_BYTES,
        DISTCP,
        SECTOR_BYTES,
        DistcpFormat,
        Footer,
        FooterError,
        block_digests,
        footer_bytes,
        footer_span,
        num_blocks,
        read_trailer,
    )
    from .keys import PickledKey, pickled_key, plain_key, text_of
    from .manifest import (
        AttachedEntry,
        FileEntry,
        Manifest,
        ManifestGist,
        ManifestHead,
        NewerVersionError,
        attached_digest,
        decode_gist,
        decode_head,
        decode_manifest,
        encode_manifest,
        structure_json,
    )
    from .manifest_fields import ManifestError
    from .metadata_reader import decode_metadata, uids_named_in
    from .metadata_writer import Group, MetadataTemplate, Place
    from .quantised import Quantised, may_be_quantised, plain_dtype, quantised_among, stored_chunks
    from .safetensors import SafetensorsFormat
    from .safetensors_header import (
        LENGTH_BYTES,
        AmbiguousNameError,
        HeaderError,
        StoredTensor,
        decode_header,
        files_of_index,
        header_bytes,
        join_files,
    )
    from .stock_compat import (
        InnerValue,
        ItemKey,
        folded,
        locations_of,
        merge_ranks,
        take_apart,
        transforms_of,
        usable_paths,
    )
    from .stored_item import (
        RECORD_HEAD_BYTES,
        StoredItem,
        UnsupportedError,
        check_item,
        check_names,
        inflated_bound,
    )
    from .torch_save import Archive, StandIn
    from .tree import (
        Tree,
        build,
        children_of,
        cut,
        grafted,
        heads_of,
        is_of_stateful,
        kind_of,
        kind_of_stateful,
        leaf_names,
        like,
        list_node,
        locate,
        mapping_kind,
        mapping_node,
        pickled_keys,
        pruned,
        subtree,
        tree_from_paths,
    )
    from .tree_json import dcp_paths, merged_trees, tree_from_json, tree_to_json
    from .zip_item import PLAIN_DTYPES, object_item, tensor_frame
    from .zip_records import Record, find_records
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "archive_records": "ArchiveRecords ContentError find_archive records_of_archive",
            "archived_items": "ArchivedItems MadeFile",
            "base": "LOOSE FileLayout Format PublicFiles PublicTensor Runs",
            "distcp": (
                "BLOCK_BYTES DISTCP SECTOR_BYTES DistcpFormat Footer FooterError block_digests "
                "footer_bytes footer_span num_blocks read_trailer"
            ),
            "keys": "PickledKey pickled_key plain_key text_of",
            "manifest": (
                "AttachedEntry FileEntry Manifest ManifestGist ManifestHead NewerVersionError "
                "attached_digest decode_gist decode_head decode_manifest encode_manifest structure_json"
            ),
            "manifest_fields": "ManifestError",
            "metadata_reader": "decode_metadata uids_named_in",
            "metadata_writer": "Group MetadataTemplate Place",
            "quantised": "Quantised may_be_quantised plain_dtype quantised_among stored_chunks",
            "safetensors": "SafetensorsFormat",
            "safetensors_header": (
                "LENGTH_BYTES AmbiguousNameError HeaderError StoredTensor decode_header files_of_index "
                "header_bytes join_files"
            ),
            "stock_compat": (
                "InnerValue ItemKey folded locations_of merge_ranks take_apart transforms_of usable_paths"
            ),
            "stored_item": (
                "RECORD_HEAD_BYTES StoredItem UnsupportedError check_item check_names inflated_bound"
            ),
            "torch_save": "Archive StandIn",
            "tree": (
                "Tree build children_of cut grafted heads_of is_of_stateful kind_of kind_of_stateful "
                "leaf_names like list_node locate mapping_kind mapping_node pickled_keys pruned subtree "
                "tree_from_paths"
            ),
            "tree_json": "dcp_paths merged_trees tree_from_json tree_to_json",
            "zip_item": "PLAIN_DTYPES object_item tensor_frame",
            "zip_records": "Record find_records",
        },
    )

__all__ = [
    "BLOCK_BYTES",
    "DISTCP",
    "LENGTH_BYTES",
    "LOOSE",
    "PLAIN_DTYPES",
    "RECORD_HEAD_BYTES",
    "SECTOR_BYTES",
    "AmbiguousNameError",
    "Archive",
    "ArchiveRecords",
    "ArchivedItems",
    "AttachedEntry",
    "ContentError",
    "DistcpFormat",
    "FileEntry",
    "FileLayout",
    "Footer",
    "FooterError",
    "Format",
    "Group",
    "HeaderError",
    "InnerValue",
    "ItemKey",
    "MadeFile",
    "Manifest",
    "ManifestError",
    "ManifestGist",
    "ManifestHead",
    "MetadataTemplate",
    "NewerVersionError",
    "PickledKey",
    "Place",
    "PublicFiles",
    "PublicTensor",
    "Quantised",
    "Record",
    "Runs",
    "SafetensorsFormat",
    "StandIn",
    "StoredItem",
    "StoredTensor",
    "Tree",
    "UnsupportedError",
    "attached_digest",
    "block_digests",
    "build",
    "check_item",
    "check_names",
    "children_of",
    "cut",
    "dcp_paths",
    "decode_gist",
    "decode_head",
    "decode_header",
    "decode_manifest",
    "decode_metadata",
    "encode_manifest",
    "files_of_index",
    "find_archive",
    "find_records",
    "folded",
    "footer_bytes",
    "footer_span",
    "grafted",
    "header_bytes",
    "heads_of",
    "inflated_bound",
    "is_of_stateful",
    "join_files",
    "kind_of",
    "kind_of_stateful",
    "leaf_names",
    "like",
    "list_node",
    "locate",
    "locations_of",
    "mapping_kind",
    "mapping_node",
    "may_be_quantised",
    "merge_ranks",
    "merged_trees",
    "num_blocks",
    "object_item",
    "pickled_key",
    "pickled_keys",
    "plain_dtype",
    "plain_key",
    "pruned",
    "quantised_among",
    "read_trailer",
    "records_of_archive",
    "renamed_paths",
    "renamed_tree",
    "stored_chunks",
    "structure_json",
    "subtree",
    "take_apart",
    "tensor_frame",
    "text_of",
    "transforms_of",
    "tree_from_json",
    "tree_from_paths",
    "tree_to_json",
    "uids_named_in",
    "usable_paths",
]
