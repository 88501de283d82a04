/** @type {import("next").NextConfig} */
export default {
  // glide is a native module: it is loaded at run time, not bundled.
  serverExternalPackages: ["@valkey/valkey-glide"],
  turbopack: { root: import.meta.dirname },
};
