-- Removes expired messages from the head of the stream, a bounded number at a time, and places delayed ones.
-- ARGV: most
-- Answer: number of entries removed
mature(100)
local most = tonumber(ARGV[1])
local got = redis.call('XRANGE', stream, '-', '+', 'COUNT', most)
local ids = {}
for _, entry in ipairs(got) do
  local expires = field(entry[2], 'tercet-expires')
  if not expires or tonumber(expires) > now then break end
  ids[#ids + 1] = entry[1]
  local own = field(entry[2], 'tercet-id')
  if own then redis.call('HDEL', placed, own) end
end
if #ids > 0 then redis.call('XDEL', stream, unpack(ids)) end
return #ids
